// A weight of few bits as the kernels get it: the canonical layout of cuda_ffi/layout.py, read as it is stored.
#pragma once

#include <cstdint>

namespace any4 {

enum class Type : int { kBfloat16, kFloat16, kFloat32, kE8m0 };

// Rows are of k inputs, k % 32 == 0: then 32 codes of a lane lie at a multiple of their size.
struct LutWeight {
  const uint8_t* codes;  // first plane, [n, k * its width / 8]
  const uint8_t* high;   // second plane of 3-bit codes, [n, k / 8]
  const void* lut;       // [n or 1, 2^bits], kBfloat16 or kFloat16
  const void* scales;    // [n, groups]
  const void* offsets;   // [n, groups], or nullptr
  int64_t n, k;
  int64_t groups;
  int64_t lut_stride;  // elements from a row's table to the next: 2^bits, or 0 where one serves all rows
  Type lut_type, scale_type, offset_type;
};

}  // namespace any4
