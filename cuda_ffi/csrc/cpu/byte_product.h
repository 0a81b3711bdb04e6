// y = x W^T for x rounded to int8 and W[n, k] = value(codes[n, k]) * scales[n, k / G] + offsets[n, k / G], where the
// values are integers of 8 bits: those of a table, or the steps of a ramp. The weight is read as it is stored;
// cuda_ffi/layout.py states the layout.
//
// kGroup inputs in a row share a scale a, the largest of their magnitudes / 127. With q = round(x / a):
//   y[m, n] = sum over weight groups g of
//       scales[n, g] * sum over input groups b in g of a[m, b] * (sum over k in b of value(codes[n, k]) * q[m, k])
//     + offsets[n, g] * sum over b in g of a[m, b] * (sum over k in b of q[m, k])
// Sums over k are exact, others float32.
#pragma once

#include <cstdint>

#include "isa.h"
#include "numbers.h"
#include "threads.h"

namespace any4 {

constexpr int64_t kGroup = 32;

struct ByteWeight {
  int64_t n, k;
  int bits;  // 4 or 8
  int64_t group_size;    // a multiple of kGroup, or at least k
  const uint8_t* codes;  // [n, ceil(k * bits / 8)]
  // [lut_rows, 2^bits]: int8 values, or a ramp of float32 or bf16: middle + step * (code - 2^(bits - 1)).
  const void* lut;
  int64_t lut_rows;  // 1 or n
  bool ramp;
  Type lut_type;       // of a ramp
  const void* scales;  // [n, groups]
  Type scales_type;
  const void* offsets;  // [n, groups] or null
  Type offsets_type;

  int64_t groups() const { return (k + group_size - 1) / group_size; }
};

struct ByteProduct {
  ByteWeight weight;
  void* y;  // [m, weight.n]
};

// The products of one x [m, k] with `count` weights, which agree in k, bits and group_size. x is rounded once, and
// threads share the rows of all weights as if they were one matrix. x and y are both of `type`, float32 or bf16.
void ByteProducts(const ByteProduct* products, int64_t count, const void* x, int64_t m, Type type, Isa isa,
                  const Executor& executor);

}  // namespace any4
