// The launch of decode attention over a KVQuant cache. Several files include this one, so that they compile in parallel.
#pragma once

#include "attention_launch.cuh"
#include "kvquant_kernel.cuh"

namespace any4 {
namespace {

template <typename T, int kSize, int kBits>
struct KVQuantForm {
  using Element = T;
  static constexpr int kThreads = KVQuantPart<kSize>::kThreads, kSide = 1, kMore = 0, kSlots = KVQuantPart<kSize>::kTokens;
  static constexpr bool kSplits = true;
  static auto Kernel() { return AttendLevels<T, kSize, kBits>; }
  static int SharedBytes(int warps) { return KVQuantPart<kSize>::SharedBytes(warps); }
};

template <typename T, int kBits>
cudaError_t LaunchKVQuant(const KVQuantStep& step, cudaStream_t stream) {
  const int slots = step.room + step.token.slots;
  return step.token.size == 64 ? LaunchParts<KVQuantForm<T, 64, kBits>>(step, step.token, slots, stream)
                               : LaunchParts<KVQuantForm<T, 128, kBits>>(step, step.token, slots, stream);
}

template <typename T>
cudaError_t LaunchKVQuant(const KVQuantStep& step, cudaStream_t stream) {
  if (step.bits == 4) return LaunchKVQuant<T, 4>(step, stream);
  return step.bits == 3 ? LaunchKVQuant<T, 3>(step, stream) : LaunchKVQuant<T, 2>(step, stream);
}

}  // namespace
}  // namespace any4
