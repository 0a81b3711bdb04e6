// Two logical operations with two constants as one instruction. It holds one of them; without care the compiler takes an
// instruction for each.
#pragma once

#include <cstdint>

namespace any4 {

// A constant in a register of the lane, which the compiler doesn't know. Blocks must have one row of threads.
__device__ __forceinline__ uint32_t InRegister(uint32_t value) { return value + threadIdx.y; }

// (word & mask) | bits.
__device__ __forceinline__ uint32_t MaskAndSet(uint32_t word, uint32_t mask, uint32_t bits) {
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(out) : "r"(word), "r"(mask), "r"(bits));
  return out;
}

// (word & mask) ^ bits.
__device__ __forceinline__ uint32_t MaskAndFlip(uint32_t word, uint32_t mask, uint32_t bits) {
  uint32_t out;
  asm("lop3.b32 %0, %1, %2, %3, 0x6A;" : "=r"(out) : "r"(word), "r"(mask), "r"(bits));
  return out;
}

}  // namespace any4
