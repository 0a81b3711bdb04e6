// Numbers of packed codes, two at a time.
#pragma once

#include "attention_numbers.cuh"

namespace any4 {
namespace {

// Selectors of __byte_perm: the low halves of two words, and the high ones.
constexpr uint32_t kLowHalves = 0x5410, kHighHalves = 0x7632;

// A code in the lowest bits of a number with this pattern adds to it.
template <typename T>
struct Numbers {
  using Two = __nv_bfloat162;
  static constexpr uint32_t kPattern = 0x43004300;  // 128

  static __device__ Two Of(uint32_t word) { return *reinterpret_cast<const Two*>(&word); }
  static __device__ Two Base() { return Of(kPattern); }
};

template <>
struct Numbers<__half> {
  using Two = __half2;
  static constexpr uint32_t kPattern = 0x64006400;  // 1024

  static __device__ Two Of(uint32_t word) { return *reinterpret_cast<const Two*>(&word); }
  static __device__ Two Base() { return Of(kPattern); }
};

// lowest + step * code, rounded once, of the codes in the lowest bits of both halves of a word, whose rest is ignored.
template <typename T, int kBits>
__device__ __forceinline__ uint32_t Decoded(uint32_t codes, uint32_t steps, uint32_t lowest) {
  using N = Numbers<T>;
  constexpr uint32_t kMask = (1 << kBits) - 1;
  // As one instruction, which the compiler would make two.
  uint32_t number;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(number) : "r"(codes), "n"(kMask << 16 | kMask), "r"(N::kPattern));
  const auto code = __hsub2(N::Of(number), N::Base());
  const auto two = __hfma2(code, N::Of(steps), N::Of(lowest));
  return *reinterpret_cast<const uint32_t*>(&two);
}

// Codes number `i` of two words with eight codes each, in the lowest bits of the halves. Words of 2-bit codes are half
// empty.
template <int kBits>
__device__ __forceinline__ uint32_t Paired(uint32_t first, uint32_t second, int i) {
  const bool high = kBits == 4 && i >= 4;
  return __byte_perm(first, second, high ? kHighHalves : kLowHalves) >> kBits * (high ? i - 4 : i);
}

}  // namespace
}  // namespace any4
