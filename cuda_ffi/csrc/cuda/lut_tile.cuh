// What LutTurns and LutGeneral share.
//
// A tile is 16 rows of W by 128 inputs. A warp takes one or more at a turn. Lane 4 g + t decodes inputs 32 t to
// 32 t + 31 of rows g and g + 8; with 4-bit codes these are 16 bytes per row, as stored. The order of inputs within a
// tensor core's product is free as long as W and x agree: step i of a tile takes inputs 32 t + 4 i to 32 t + 4 i + 3 of
// each t, so that the fragments of x are 16-byte loads too and need no shared memory. The warps of a block split the
// inputs of its rows and add their sums in a fixed order.
#pragma once

#include <cstdint>
#include <type_traits>

#include "decode.cuh"
#include "fragment.cuh"
#include "lut_weight.h"

namespace any4 {

constexpr int kTileRows = 16, kTileInputs = 128;

// How rows of x become columns of work. Where a tile holds 2^split groups, each row of x takes 2^split columns, one for
// each group, with zeros in place of the other groups' inputs: every column then has one scale per row of W.
struct Columns {
  int m;            // rows of x
  int split;        // log2 of the groups in a tile; 0 where a group holds whole tiles
  int group_shift;  // log2 of the tiles in a group where split is 0
};

// Loads a lane's codes of a row and tile: the 32 from `input` on.
template <int kBits>
__device__ __forceinline__ void LoadCodes(const LutWeight& w, int64_t row, int64_t input, uint32_t (&words)[kBits]) {
  if constexpr (kBits == 4 || kBits == 8) {
    const uint8_t* from = w.codes + (row * w.k + input) * kBits / 8;
#pragma unroll
    for (int i = 0; i < kBits / 4; ++i) {
      const uint4 v = LoadStreaming(from + 16 * i);
      words[4 * i] = v.x, words[4 * i + 1] = v.y, words[4 * i + 2] = v.z, words[4 * i + 3] = v.w;
    }
  } else {
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(w.codes + (row * w.k + input) / 4));
    words[0] = v.x, words[1] = v.y;
    if constexpr (kBits == 3) words[2] = __ldg(reinterpret_cast<const uint32_t*>(w.high + (row * w.k + input) / 8));
  }
}

// part += tile x, for eight inputs per lane and eight columns.
template <typename T>
__device__ __forceinline__ void AddProducts(float (&part)[4], const uint32_t (&top)[4], const uint32_t (&bottom)[4],
                                            const uint4& x) {
  TensorProduct<T>(part, top[0], bottom[0], top[1], bottom[1], x.x, x.y);
  TensorProduct<T>(part, top[2], bottom[2], top[3], bottom[3], x.z, x.w);
}

// sum += ones x, which the offsets are multiplied by. Tensor cores have time to spare; the other pipes do not.
template <typename T>
__device__ __forceinline__ void AddInputs(float (&sum)[4], uint32_t x0, uint32_t x1) {
  constexpr uint32_t ones = std::is_same_v<T, __half> ? 0x3C003C00u : 0x3F803F80u;
  TensorProduct<T>(sum, ones, ones, ones, ones, x0, x1);
}

// From one column of kept sums to the next: 20, not 16, so that the eight rows of four lanes fall on different banks.
constexpr int kColumn = kTileRows + 4;

// Stores a lane's part of the sums, which have the layout of TensorProduct, to shared memory [column, row].
template <int kCount>
__device__ __forceinline__ void KeepSums(const float (&sums)[kCount / 8][4], float* partial) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int c = 0; c < kCount / 8; ++c) {
    float* column = partial + (8 * c + 2 * t) * kColumn + g;
    column[0] = sums[c][0];
    column[kColumn] = sums[c][1];
    column[8] = sums[c][2];
    column[kColumn + 8] = sums[c][3];
  }
}

// The same for a single row of x, whose columns are its groups: stores the sum of the columns.
__device__ __forceinline__ void KeepSum(const float (&sums)[4], float* partial) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    float sum = sums[2 * r] + sums[2 * r + 1];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    if (threadIdx.x % 4 == 0) partial[threadIdx.x / 4 + 8 * r] = sum;
  }
}

// Adds up the sums that were kept for each share, [shares, tiles, count, kColumn], and stores the result. Each row of x
// has `per_row` columns.
template <typename T>
__device__ __forceinline__ void StoreSums(const float* partial, int shares, int count, int tiles, int per_row,
                                          int first_m, int m, int64_t first_row, int64_t n, T* y) {
  const int mine = min(count / per_row, m - first_m);
  __syncthreads();
  for (int i = threadIdx.y * 32 + threadIdx.x; i < tiles * mine * kTileRows; i += 32 * blockDim.y) {
    const int in_tile = i % kTileRows, tile = i / kTileRows % tiles, of_x = i / kTileRows / tiles;
    float total = 0;
    for (int share = 0; share < shares; ++share) {
      const float* column = partial + ((share * tiles + tile) * count + of_x * per_row) * kColumn + in_tile;
      for (int part = 0; part < per_row; ++part) total += column[part * kColumn];
    }
    const int64_t row = first_row + tile * kTileRows + in_tile;
    if (row < n) y[(first_m + of_x) * n + row] = static_cast<T>(total);
  }
}

// The turns that a warp takes.
struct Turns {
  int begin, end;
  int share;  // the warp's first

  __device__ __forceinline__ explicit Turns(const Shares& shares) {
    share = threadIdx.y * shares.of_warp;
    begin = min(share * shares.turns, shares.all_turns);
    end = min(begin + shares.of_warp * shares.turns, shares.all_turns);
  }
};

}  // namespace any4
