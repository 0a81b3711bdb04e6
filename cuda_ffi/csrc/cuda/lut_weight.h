// A weight of few bits as the kernels get it: in the canonical layout of cuda_ffi/layout.py, as it is stored.
#pragma once

#include <cstdint>

namespace any4 {

enum class Type : int { kBfloat16, kFloat16, kFloat32, kE8m0, kInt8 };

// A row has k inputs, and k % 32 == 0, so that a lane's 32 codes lie at a multiple of their size. Each array may be a
// stack, which holds the arrays of several such matrices one after the other; the pointers are to the first.
struct LutWeight {
  const uint8_t* codes;  // first plane, [n, k * its width / 8]
  const uint8_t* high;   // second plane of 3-bit codes, [n, k / 8]
  const void* lut;       // [n or 1, 2^bits], kBfloat16, kFloat16 or kInt8; for ByteProducts kInt8 alone
  const void* scales;    // [n, groups]
  const void* offsets;   // [n, groups], or nullptr
  const int32_t* index;  // number of the matrix in the stack, on the device; nullptr for the first
  int64_t stack;         // matrices in the stack; an index out of range is clamped
  int64_t n, k;
  int64_t groups;
  int64_t lut_stride;  // elements from one row's table to the next: 2^bits, or 0 where all rows share one table
  Type lut_type, scale_type, offset_type;
};

// The inputs of a row are split into this many shares, whose sums are added in their order: the result has the same
// bits whatever number of warps computes them.
constexpr int kShares = 8;

// How the warps of a block split a row.
struct Shares {
  int all_turns, turns;  // turns of the row, and of a share
  int count, of_warp;    // shares that hold any turns, and shares that a warp takes

  Shares(int64_t turns_of_row, int warps)
      : all_turns(static_cast<int>(turns_of_row)),
        turns((all_turns + kShares - 1) / kShares),
        count((all_turns + turns - 1) / turns),
        of_warp(kShares / warps) {}
};

// The most matrices that one launch multiplies with the same x: q, k and v; gate and up; four experts.
constexpr int kMostTogether = 4;

// The weights of a launch, the result [m, n] of each, and the number of the grid's blocks up to the end of each.
struct LutBatch {
  LutWeight weights[kMostTogether];
  void* results[kMostTogether];
  unsigned ends[kMostTogether];
};

}  // namespace any4
