// The launch of decode attention over a KIVI cache. Several files include this one, so that they compile in parallel.
#pragma once

#include "attention_launch.cuh"
#include "kivi_kernel.cuh"

namespace any4 {
namespace {

template <typename T, int kSize>
struct KiviForm {
  using Element = T;
  static constexpr int kThreads = KiviPart<kSize>::kThreads, kSide = KiviPart<kSize>::kSide, kMore = 1, kSlots = kTokens;
  static constexpr bool kSplits = true;
  static auto Kernel() { return AttendCodes<T, kSize>; }
  static int SharedBytes(int warps) { return KiviPart<kSize>::SharedBytes(warps); }
};

template <typename T>
cudaError_t LaunchKivi(const KiviStep& step, cudaStream_t stream) {
  const int slots = step.value_positions + step.token.slots;
  return step.token.size == 64 ? LaunchParts<KiviForm<T, 64>>(step, step.token, slots, stream)
                               : LaunchParts<KiviForm<T, 128>>(step, step.token, slots, stream);
}

}  // namespace
}  // namespace any4
