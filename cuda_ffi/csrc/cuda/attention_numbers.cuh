// Products of small matrices of two-byte elements on tensor cores, and how their operands come from shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace any4 {

// c [16, 8] += a [16, 16] b [16, 8]. Lane l holds of c the elements (l / 4, 2 (l % 4)), the next column, and the same
// eight rows below; of a, pairs of columns in that order with the rows first; of b, pairs of rows at column l / 4.
template <typename T>
__device__ __forceinline__ void MultiplyAdd(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  if constexpr (std::is_same_v<T, __half>) {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
}

// Four 8 x 8 tiles, transposed. Lane l gives the address of row l % 8 of tile l / 8.
__device__ __forceinline__ void LoadTransposed(const void* row, uint32_t (&tiles)[4]) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
               : "r"(at)
               : "memory");
}

// Four 8 x 8 tiles as they are.
__device__ __forceinline__ void LoadMatrices(const void* row, uint32_t (&tiles)[4]) {
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(tiles[0]), "=r"(tiles[1]), "=r"(tiles[2]), "=r"(tiles[3])
               : "r"(at)
               : "memory");
}

// Two numbers as rounded ones and what the rounding left, so that products lose nothing that counts in float32.
template <typename T>
struct Split {
  uint32_t high, low;

  __device__ Split(float a, float b) {
    const T rounded[2] = {static_cast<T>(a), static_cast<T>(b)};
    const T rest[2] = {static_cast<T>(a - static_cast<float>(rounded[0])),
                       static_cast<T>(b - static_cast<float>(rounded[1]))};
    high = Word(rounded), low = Word(rest);
  }
  __device__ static uint32_t Word(const T (&pair)[2]) {
    const auto* const bits = reinterpret_cast<const uint16_t*>(pair);
    return bits[0] | static_cast<uint32_t>(bits[1]) << 16;
  }
};

}  // namespace any4
