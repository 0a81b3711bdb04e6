// Decodes weights in registers: eight codes and a row's table in, eight values of the tensor core's type out.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "fragment.cuh"
#include "lut_weight.h"

namespace any4 {

// Converts two bfloat16 to two float16, with rounding.
__device__ __forceinline__ uint32_t ToHalves(uint32_t pair) {
  const __half2 halves = __floats2half2_rn(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
  return reinterpret_cast<const uint32_t&>(halves);
}

// Moves the upper 16 bits of a word to the lower half. Both halves must be finite as float16: then adding -0 changes no
// bit. The addition runs on the FMA pipe, which is idle here; a shift would take a slot of the pipe that permutes
// bytes.
__device__ __forceinline__ uint32_t UpperHalf(uint32_t word) {
  uint32_t out;
  asm("{.reg .f16 low, high; .reg .b32 both; mov.b32 {low, high}, %1; mov.b32 both, {high, high};"
      " add.rn.f16x2 %0, both, %2;}"
      : "=r"(out)
      : "r"(word), "r"(0x80008000u));
  return out;
}

// Converts bytes 2 * half and 2 * half + 1 of a word to T, exactly: a table of int8 is that of its integers.
template <typename T>
__device__ __forceinline__ uint32_t FromBytes(uint32_t word, int half) {
  const float first = static_cast<int8_t>(word >> (16 * half)), second = static_cast<int8_t>(word >> (16 * half + 8));
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(first, second);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

// The entries 2 i and 2 i + 1 of a row's table, as T.
template <typename T>
__device__ __forceinline__ uint32_t TablePair(const LutWeight& w, int64_t row, int i) {
  if (w.lut_type == Type::kInt8) {
    return FromBytes<T>(__ldg(static_cast<const uint32_t*>(w.lut) + row * w.lut_stride / 4 + i / 2), i % 2);
  }
  const uint32_t pair = __ldg(static_cast<const uint32_t*>(w.lut) + row * w.lut_stride / 2 + i);
  return std::is_same_v<T, __half> && w.lut_type == Type::kBfloat16 ? ToHalves(pair) : pair;
}

// A table of up to 16 entries in registers, split into a plane of low bytes and a plane of high bytes: one PRMT looks
// up the bytes of four codes in a plane.
template <typename T, int kBits>
struct Decoder {
  static constexpr int kWords = (1 << kBits) / 4;
  uint32_t low[kWords], high[kWords];

  __device__ __forceinline__ void Load(const LutWeight& w, int64_t row) {
#pragma unroll
    for (int i = 0; i < kWords; ++i) {
      const uint32_t a = TablePair<T>(w, row, 2 * i), b = TablePair<T>(w, row, 2 * i + 1);
      low[i] = Permute(a, b, 0x6420);
      high[i] = Permute(a, b, 0x7531);
    }
  }

  // The selector nibbles of eight codes, the first in the lowest bits. `words` holds a lane's 32 codes of a row; 3-bit
  // codes lie in two planes.
  static __device__ __forceinline__ uint32_t Selectors(const uint32_t (&words)[kBits], int eighth) {
    if constexpr (kBits == 4) return words[eighth];
    // Spreads 16 bits, two per code, to a nibble per code. The left shifts are multiplications on the FMA pipe.
    uint32_t v = eighth % 2 ? words[eighth / 2] >> 16 : words[eighth / 2] & 0xFFFFu;
    v = (v | v << 8) & 0x00FF00FFu;
    v = (v | v << 4) & 0x0F0F0F0Fu;
    v = (v | v << 2) & 0x33333333u;
    if constexpr (kBits == 3) {
      uint32_t bit = (words[2] >> (8 * eighth)) & 0xFFu;
      bit = (bit | bit << 12) & 0x000F000Fu;
      bit = (bit | bit << 6) & 0x03030303u;
      v |= (bit << 2 | bit << 5) & 0x44444444u;
    }
    return v;
  }

  // Eight values in the order of their codes, two per register.
  __device__ __forceinline__ void Decode(const uint32_t (&words)[kBits], int eighth, uint32_t (&out)[4]) const {
    const uint32_t codes = Selectors(words, eighth);
    uint32_t select = codes & 0x77777777u;
    // The highest of a code's four bits chooses between the halves of the table: byte i of the first or of the second.
    uint32_t choose = kBits == 4 ? ((codes >> 1) & 0x44444444u) | 0x32103210u : 0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const uint32_t l = Look(low, select, choose), h = Look(high, select, choose);
      out[2 * half] = Permute(l, h, 0x5140);
      out[2 * half + 1] = Permute(l, h, 0x7362);
      select = UpperHalf(select);
      choose = UpperHalf(choose);
    }
  }

  static __device__ __forceinline__ uint32_t Look(const uint32_t (&plane)[kWords], uint32_t select, uint32_t choose) {
    if constexpr (kBits == 2) return Permute(plane[0], plane[0], select);
    if constexpr (kBits == 3) return Permute(plane[0], plane[1], select);
    if constexpr (kBits == 4) {
      return Permute(Permute(plane[0], plane[1], select), Permute(plane[2], plane[3], select), choose);
    }
  }

  // W = value * scale + offset, and the table holds the values themselves.
  __device__ __forceinline__ void Affine(float&, float&) const {}
};

// 8-bit codes, whose table is a ramp. The decoded value is code - 128, which is exact in both types; the ramp's step
// and middle are folded into scale and offset.
template <typename T>
struct Decoder<T, 8> {
  float step, middle;

  __device__ __forceinline__ void Load(const LutWeight& w, int64_t row) {
    const bool halves = w.lut_type == Type::kFloat16;
    const uint32_t pair = halves ? TablePair<__half>(w, row, 0) : TablePair<__nv_bfloat16>(w, row, 0);
    float first = __uint_as_float(pair << 16), second = __uint_as_float(pair & 0xFFFF0000u);
    if (halves) {
      const float2 both = __half22float2(reinterpret_cast<const __half2&>(pair));
      first = both.x;
      second = both.y;
    }
    step = second - first;
    middle = fmaf(128.0f, step, first);
  }

  __device__ __forceinline__ void Decode(const uint32_t (&words)[8], int eighth, uint32_t (&out)[4]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t word = words[2 * eighth + i / 2], bytes = i % 2 ? 0x4342 : 0x4140;
      if constexpr (std::is_same_v<T, __half>) {
        // As float16, 0x64cc is 1024 + code.
        const uint32_t biased = Permute(word, 0x64646464u, bytes);
        const __half2 value = __hadd2(reinterpret_cast<const __half2&>(biased), __float2half2_rn(-1152.0f));
        out[i] = reinterpret_cast<const uint32_t&>(value);
      } else {
        // As bfloat16, 0x43cc is 128 + c for the seven low bits c. Then 256 is subtracted, or 128 where the eighth bit
        // is set.
        const uint32_t code = Permute(word, 0, bytes);
        const uint32_t biased = (code & 0x007F007Fu) | 0x43004300u, bias = (code & 0x00800080u) ^ 0xC380C380u;
        const __nv_bfloat162 value =
            __hadd2(reinterpret_cast<const __nv_bfloat162&>(biased), reinterpret_cast<const __nv_bfloat162&>(bias));
        out[i] = reinterpret_cast<const uint32_t&>(value);
      }
    }
  }

  __device__ __forceinline__ void Affine(float& scale, float& offset) const {
    offset = fmaf(scale, middle, offset);
    scale *= step;
  }
};

// The tables of 8 rows in shared memory, with an entry for each pair of 4-bit codes. A pair is a byte as stored, so one
// look-up gives the two values of a register. Each of a row's four lanes has its own copy, word [entry][row][t]: lane
// 4 row + t reads only bank 4 row + t, whatever the codes are.
constexpr int kPairTableBytes = 256 * 32 * 4;

// Fills the table for the 8 rows from `first_row` on. All warps of the block take part, and __syncthreads() must
// follow.
template <typename T>
__device__ __forceinline__ void FillPairTable(const LutWeight& w, int64_t first_row, unsigned char* table) {
  const int row = threadIdx.x % 8, part = threadIdx.x / 8;
  const auto entry = [&](int code) {
    const uint32_t pair = TablePair<T>(w, first_row + row, code / 2);
    return code % 2 ? pair >> 16 : pair & 0xFFFFu;
  };
  uint32_t low[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) low[i] = entry(4 * i + part);
  for (int high = threadIdx.y; high < 16; high += blockDim.y) {
    const uint32_t upper = entry(high) << 16;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair = low[i] | upper;
      auto* at = reinterpret_cast<uint4*>(table + (16 * high + 4 * i + part) * 128 + row * 16);
      *at = make_uint4(pair, pair, pair, pair);
    }
  }
}

// Decodes eight codes of the lane's row, two values per register.
__device__ __forceinline__ void DecodePairs(const unsigned char* table, uint32_t word, uint32_t (&out)[4]) {
  const uint32_t lane = 4 * threadIdx.x;
  const auto look = [&](uint32_t entry) {
    return *reinterpret_cast<const uint32_t*>(table + ((entry & 0x7F80u) | lane));
  };
  out[0] = look(word << 7);
  out[1] = look(word >> 1);
  out[2] = look(word >> 9);
  out[3] = look(word >> 17);
}

}  // namespace any4
