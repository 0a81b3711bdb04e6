// A weight of few bits as the kernels get it: the canonical layout of cuda_ffi/layout.py, read as it is stored.
#pragma once

#include <cstdint>

namespace any4 {

enum class Type : int { kBfloat16, kFloat16, kFloat32, kE8m0 };

// Rows are of k inputs, k % 32 == 0: then 32 codes of a lane lie at a multiple of their size. Every array may be a
// stack of several matrices' of this shape, one after the other; the pointers are to the first.
struct LutWeight {
  const uint8_t* codes;  // first plane, [n, k * its width / 8]
  const uint8_t* high;   // second plane of 3-bit codes, [n, k / 8]
  const void* lut;       // [n or 1, 2^bits], kBfloat16 or kFloat16
  const void* scales;    // [n, groups]
  const void* offsets;   // [n, groups], or nullptr
  const int32_t* index;  // of the matrix in the stack, on the device; or nullptr for the first
  int64_t stack;         // matrices in it; an index outside is taken for the nearest
  int64_t n, k;
  int64_t groups;
  int64_t lut_stride;  // elements from a row's table to the next: 2^bits, or 0 where one serves all rows
  Type lut_type, scale_type, offset_type;
};

// The inputs of a row are shared out in so many parts, whose sums are added up in their order: whatever number of warps
// computes them, the result is the same bit for bit.
constexpr int kShares = 8;

// How a block of so many warps goes through a row.
struct Shares {
  int all_turns, turns;  // of the row, and of a share
  int count, of_warp;    // shares that hold any turns, and shares of a warp

  Shares(int64_t turns_of_row, int warps)
      : all_turns(static_cast<int>(turns_of_row)),
        turns((all_turns + kShares - 1) / kShares),
        count((all_turns + turns - 1) / turns),
        of_warp(kShares / warps) {}
};

// Matrices that one launch can multiply with the same x: q, k and v; gate and up; four experts.
constexpr int kMostTogether = 4;

// Their weights, the results [m, n] of each, and how many of the grid's blocks there are up to and with each.
struct LutBatch {
  LutWeight weights[kMostTogether];
  void* results[kMostTogether];
  unsigned ends[kMostTogether];
};

}  // namespace any4
