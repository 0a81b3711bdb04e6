// y = x W^T for W[n, k] = lut[n or 0, codes[n, k]] * scales[n, k / G] + offsets[n, k / G]. The weight is read as it is
// stored; cuda_ffi/layout.py states the layout.
#pragma once

#include <cstdint>

#include "isa.h"
#include "numbers.h"
#include "threads.h"

namespace any4 {

struct LutWeight {
  int64_t n, k;
  int bits;
  int64_t group_size;
  const uint8_t* codes;  // [n, plane bytes]
  const uint8_t* high;   // the second plane of 3, 5 and 6 bits
  const void* lut;       // [lut_rows, 2^bits]
  int64_t lut_rows;      // 1 or n
  Type lut_type;
  const void* scales;  // [n, groups]
  Type scales_type;
  const void* offsets;  // [n, groups] or null
  Type offsets_type;

  int64_t groups() const { return (k + group_size - 1) / group_size; }
};

struct Product {
  LutWeight weight;
  void* y;  // [m, weight.n]
};

// The products of one x [m, k] with `count` weights, which agree in k, bits and group_size. Threads share the rows of
// all weights as if they were one matrix. x and y are both of `type`, float32 or bf16; sums are float32.
void LutProducts(const Product* products, int64_t count, const void* x, int64_t m, Type type, Isa isa,
                 const Executor& executor);

}  // namespace any4
