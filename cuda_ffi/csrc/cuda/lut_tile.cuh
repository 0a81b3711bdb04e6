// What the kernels of y = x W^T have in common.
//
// A tile is 16 rows of W by 128 inputs, the work of a warp's turn. Lane 4 g + t decodes the 32 inputs from 32 t on of
// rows g and g + 8: of 4-bit codes 16 bytes a row, as they are stored. The order of inputs within a tensor core's
// product is free as long as W and x agree: step i of a tile takes inputs 32 t + 4 i to 32 t + 4 i + 3 of each t, so
// that the fragments of x are 16-byte loads too and need no shared memory. The warps of a block share out the inputs
// of its rows and add up their sums in a fixed order.
#pragma once

#include <cstdint>
#include <type_traits>

#include "decode.cuh"
#include "fragment.cuh"
#include "lut_weight.h"

namespace any4 {

constexpr int kTileRows = 16, kTileInputs = 128;

// How columns of work come from rows of x. Where a tile holds 2^split groups, each row of x takes 2^split columns, one
// for each group, which see zeros in place of the other groups' inputs: so every column keeps to one scale.
struct Columns {
  int m;            // rows of x
  int split;        // log2 of the groups in a tile; 0 where a group holds whole tiles
  int group_shift;  // log2 of the tiles in a group where split is 0
};

// part += tile x for eight inputs a lane, of eight columns.
template <typename T>
__device__ __forceinline__ void AddProducts(float (&part)[4], const uint32_t (&top)[4], const uint32_t (&bottom)[4],
                                            const uint4& x) {
  TensorProduct<T>(part, top[0], bottom[0], top[1], bottom[1], x.x, x.y);
  TensorProduct<T>(part, top[2], bottom[2], top[3], bottom[3], x.z, x.w);
}

// sum += ones x: what offsets are multiplied with. Tensor cores have time to spare, other pipes have not.
template <typename T>
__device__ __forceinline__ void AddInputs(float (&sum)[4], uint32_t x0, uint32_t x1) {
  constexpr uint32_t ones = std::is_same_v<T, __half> ? 0x3C003C00u : 0x3F803F80u;
  TensorProduct<T>(sum, ones, ones, ones, ones, x0, x1);
}

// A lane's corner of the sums, in the layout of TensorProduct, to shared memory [column, row].
template <int kCount>
__device__ __forceinline__ void KeepSums(const float (&sums)[kCount / 8][4], float* partial) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
#pragma unroll
  for (int c = 0; c < kCount / 8; ++c) {
    float* column = partial + (8 * c + 2 * t) * kTileRows + g;
    column[0] = sums[c][0];
    column[kTileRows] = sums[c][1];
    column[8] = sums[c][2];
    column[kTileRows + 8] = sums[c][3];
  }
}

// Adds up what the warps kept, [warps, tiles, count, 16], and stores it; each row of x has `per_row` columns.
template <typename T>
__device__ __forceinline__ void StoreSums(const float* partial, int count, int tiles, int per_row, int first_m, int m,
                                          int64_t first_row, int64_t n, T* y) {
  const int warps = blockDim.y, mine = min(count / per_row, m - first_m);
  __syncthreads();
  for (int i = threadIdx.y * 32 + threadIdx.x; i < tiles * mine * kTileRows; i += 32 * warps) {
    const int in_tile = i % kTileRows, tile = i / kTileRows % tiles, of_x = i / kTileRows / tiles;
    float total = 0;
    for (int warp = 0; warp < warps; ++warp) {
      const float* column = partial + ((warp * tiles + tile) * count + of_x * per_row) * kTileRows + in_tile;
      for (int part = 0; part < per_row; ++part) total += column[part * kTileRows];
    }
    const int64_t row = first_row + tile * kTileRows + in_tile;
    if (row < n) y[(first_m + of_x) * n + row] = static_cast<T>(total);
  }
}

}  // namespace any4
