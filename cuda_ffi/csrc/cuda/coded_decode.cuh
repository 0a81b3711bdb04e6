// How CodedTurns turns 3-bit codes of W, and of its scales, into numbers.
#pragma once

#include "coded_product.h"
#include "decode.cuh"
#include "mask.cuh"

namespace any4 {

// A ramp's codes go to the mantissa of a power of two, beside which one is worth 1. What that is too much is the same
// for all rows of W, and is subtracted from the sums. A word of the low plane has 16 codes, of a group; inputs i and
// i + 8 are at the same place of its halves, and are the two of a register.
struct Ramp {
  uint32_t threes[3];  // 0x00030003, and it 2 and 4 bits on

  __device__ __forceinline__ void Load(const LutWeight&, int64_t) {
#pragma unroll
    for (int i = 0; i < 3; ++i) threes[i] = InRegister(0x00030003u << (2 * i));
  }

  // The place of a register's codes.
  static __device__ constexpr int Place(int i) { return 2 * (i % 3); }

  __device__ __forceinline__ void Decode(const uint32_t (&words)[3], int half, uint32_t (&out)[8]) const {
    const uint32_t high = Permute(words[2], 0, half == 0 ? 0x4140 : 0x4342);
    const auto place = [&](int i, uint32_t low, uint32_t high_of) {
      const uint32_t power = (0x4300u - 0x80u * Place(i)) * 0x10001u;
      out[i] = MaskAndSet(high_of, 0x00040004u << Place(i), MaskAndSet(low, threes[i % 3], power));
    };
    const uint32_t low = words[half], low6 = low >> 6, low12 = low >> 12, high4 = high >> 4;
    place(0, low, high << 2);
    place(1, low, high << 3);
    place(2, low, high << 4);
    place(3, low6, high >> 1);
    place(4, low6, high);
    place(5, low6, high << 1);
    place(6, low12, high4);
    place(7, low12, high4 << 1);
  }

  // A group of x in the order of registers.
  static __device__ __forceinline__ void Arrange(const uint32_t (&x)[8], uint32_t (&out)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = Permute(x[i / 2], x[4 + i / 2], i % 2 ? 0x7632 : 0x5410);
  }

  // Where one of them is then, in bytes.
  static __device__ __forceinline__ uint32_t Offset(uint32_t column) {
    return column / 16 * 32 + column % 8 * 4 + column / 8 % 2 * 2;
  }

  // What sums of products begin with, given the sum of a group's inputs and of their powers: then W is the sum times
  // the step.
  struct Sums {
    float first, step;

    __device__ __forceinline__ explicit Sums(const LutWeight& w) {
      const uint32_t pair = TablePair<__nv_bfloat16>(w, 0, 0);
      first = __uint_as_float(pair << 16);
      step = __uint_as_float(pair & 0xFFFF0000u) - first;
    }
    __device__ __forceinline__ float Start(float inputs, float powers) const {
      return first / step * inputs - powers;
    }
  };
};

// Any table: entries are looked up. Registers i hold inputs 2 i and 2 i + 1.
struct Table {
  Decoder<__nv_bfloat16, 3> table;

  __device__ __forceinline__ void Load(const LutWeight& w, int64_t row) { table.Load(w, row); }

  static __device__ constexpr int Place(int) { return 0; }

  __device__ __forceinline__ void Decode(const uint32_t (&words)[3], int half, uint32_t (&out)[8]) const {
#pragma unroll
    for (int eighth = 0; eighth < 2; ++eighth) {
      uint32_t four[4];
      table.Decode(words, 2 * half + eighth, four);
#pragma unroll
      for (int i = 0; i < 4; ++i) out[4 * eighth + i] = four[i];
    }
  }

  static __device__ __forceinline__ void Arrange(const uint32_t (&x)[8], uint32_t (&out)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = x[i];
  }

  static __device__ __forceinline__ uint32_t Offset(uint32_t column) { return column * 2; }

  struct Sums {
    static constexpr float step = 1;

    __device__ __forceinline__ explicit Sums(const LutWeight&) {}
    __device__ __forceinline__ float Start(float, float) const { return 0; }
  };
};

// The ramp of a coded matrix.
struct Levels {
  float first, step;

  __device__ __forceinline__ explicit Levels(const CodedScales& of) {
    const uint32_t pair = of.low == nullptr ? 0 : __ldg(static_cast<const uint32_t*>(of.lut));
    first = __uint_as_float(pair << 16);
    step = __uint_as_float(pair & 0xFFFF0000u) - first;
  }

  // code * x + y is the value of a code in a range, times `by`.
  __device__ __forceinline__ float2 Factors(uint16_t scale, uint16_t offset, float by) const {
    const float of_scale = __uint_as_float(uint32_t{scale} << 16) * by;
    return make_float2(of_scale * step, fmaf(of_scale, first, __uint_as_float(uint32_t{offset} << 16) * by));
  }
};

// The values of rows g and g + 8 of 16, given the words of their codes. `threes` is 0x00030003 in a register.
__device__ __forceinline__ float2 CodedValues(uint32_t low, uint32_t high, const float2& factors, int g,
                                              uint32_t threes) {
  // As float16, 0x6400 + c is 1024 + c.
  const uint32_t bits = MaskAndSet(Permute((high << 2) >> g, 0, 0x4140), 0x00040004u,
                                   MaskAndSet(low >> (2 * g), threes, 0x64006400u));
  const __half2 codes = __hadd2(reinterpret_cast<const __half2&>(bits), __float2half2_rn(-1024.0f));
  return make_float2(fmaf(__low2float(codes), factors.x, factors.y), fmaf(__high2float(codes), factors.x, factors.y));
}

}  // namespace any4
