// A weight as it is stored, which cuda_ffi/layout.py states, and its product with the rows of x.
#pragma once

#include <cstdint>

#include "numbers.h"

namespace any4 {

// Widths of the planes of a code.
constexpr int LowBits(int bits) { return bits == 3 ? 2 : bits == 5 || bits == 6 ? 4 : bits; }
constexpr int HighBits(int bits) { return bits - LowBits(bits); }
inline int64_t PlaneBytes(int64_t k, int width) { return (k * width + 7) / 8; }

struct Turned;

// W[n, k] = lut[n or 0, codes[n, k]] * scales[n, k / G] + offsets[n, k / G].
struct Weight {
  int64_t n, k;
  int bits;
  int64_t group_size;
  const uint8_t* codes;  // [n, plane bytes]
  const uint8_t* high;   // the second plane of 3, 5 and 6 bits
  const void* lut;       // [lut_rows, 2^bits]
  int64_t lut_rows;      // 1 or n
  bool integers;         // lut holds int8, and has no lut_type
  Type lut_type;
  const void* scales;  // [n, groups]
  Type scales_type;
  const void* offsets;  // [n, groups] or null
  Type offsets_type;
  // What is decoded to scales and offsets [n, groups] in the place of these arrays; null: none.
  const Turned* turned_scales;
  const Turned* turned_offsets;

  int64_t groups() const { return (k + group_size - 1) / group_size; }
};

struct Product {
  Weight weight;
  void* y;  // [m, weight.n]
};

}  // namespace any4
