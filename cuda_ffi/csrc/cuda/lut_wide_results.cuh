// What LutWide does with the sums of a tile: adds up those of its warpgroups and of its blocks, rounds and stores them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "hopper.cuh"

namespace any4 {

template <typename T>
__device__ __forceinline__ uint32_t Round(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

// Adds the sums of a tile's warpgroups, in their order, to those of the first. The block's named barrier 1 + in_block
// is for all warpgroups of the tile.
template <typename Of>
__device__ __forceinline__ void AddTurns(float (&sums)[Of::kColumns / 2], unsigned char* shared, int in_block,
                                         int turn) {
  constexpr int kCount = Of::kColumns / 2, kThreads = 128 * Of::kSplit;
  if constexpr (Of::kSplit > 1) {
    float* kept = reinterpret_cast<float*>(shared + Of::kSumsAt + in_block * Of::kSumBytes) + threadIdx.x % 128;
    if (turn > 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) kept[((turn - 1) * kCount + i) * 128] = sums[i];
    }
    SyncSome(1 + in_block, kThreads);
    if (turn == 0) {
#pragma unroll
      for (int other = 0; other < Of::kSplit - 1; ++other) {
#pragma unroll
        for (int i = 0; i < kCount; ++i) sums[i] += kept[(other * kCount + i) * 128];
      }
    }
    // A cluster that splits K computes one tile only, so nothing is written here again.
    if constexpr (Of::kParts == 1) SyncSome(1 + in_block, kThreads);
  }
}

// Of two blocks that each computed a part of K, adds up the sums. The block of part 0 gets the first half of the
// columns, the other the rest: each sends the half that it doesn't keep to where the other's stages were. Warpgroups
// whose `turn` is not 0 only keep up with the barriers. Call ArriveInCluster() after the last use of the stages, and
// then this.
template <typename Of>
__device__ __forceinline__ void AddParts(float (&sums)[Of::kColumns / 2], unsigned char* shared, int in_block, int turn,
                                         uint32_t part) {
  constexpr int kHalf = Of::kColumns / 4, kBytes = kHalf * 128 * 4;
  static_assert(Of::kTiles * kBytes <= Of::kResultsAt);
  const int at = in_block * kBytes + threadIdx.x % 128 * 16;
  WaitForCluster();
  if (turn == 0) {
    const uint32_t there = AddressIn(1 - part, SharedAddress(shared) + at);
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const float low = sums[i], high = sums[kHalf + i];
      sums[i] = part == 1 ? high : low;
      sums[kHalf + i] = part == 1 ? low : high;
    }
#pragma unroll
    for (int i = 0; i < kHalf; i += 4) {
      StoreAt(there + i * 512, sums[kHalf + i], sums[kHalf + i + 1], sums[kHalf + i + 2], sums[kHalf + i + 3]);
    }
  }
  ArriveInCluster();
  WaitForCluster();
  if (turn != 0) return;
#pragma unroll
  for (int i = 0; i < kHalf; i += 4) {
    const float4 sent = *reinterpret_cast<const float4*>(shared + at + i * 512);
    sums[i] += sent.x;
    sums[i + 1] += sent.y;
    sums[i + 2] += sent.z;
    sums[i + 3] += sent.w;
  }
}

// Starts the copy of a tile's results to (first_row, column) of y, whose rows are those of x: kShareColumns of them.
// Named barrier 8 + in_block is for the warpgroup that stores them.
template <typename T, typename Of>
__device__ __forceinline__ void StoreResults(const CUtensorMap& y, const float (&sums)[Of::kColumns / 2],
                                             unsigned char* shared, int64_t first_row, int column, int in_block) {
  const int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32, own = 8 + in_block;
  // [rows of x, 64 rows of W], swizzled in 128 bytes.
  const uint32_t results = SharedAddress(shared) + Of::kResultsAt + in_block * Of::kResultBytes;
  if (thread == 0) WaitCopiedOut();
  SyncSome(own, 128);
  const int row = lane / 16 * 8 + lane % 8, piece = (2 * warp + lane / 8 % 2) ^ (lane % 8);
#pragma unroll
  for (int j = 0; j < Of::kShareColumns / 8; j += 2) {
    StoreTransposed(results + (8 * j + row) * 128 + piece * 16, Round<T>(sums[4 * j], sums[4 * j + 1]),
                    Round<T>(sums[4 * j + 2], sums[4 * j + 3]), Round<T>(sums[4 * j + 4], sums[4 * j + 5]),
                    Round<T>(sums[4 * j + 6], sums[4 * j + 7]));
  }
  FenceForCopies();
  SyncSome(own, 128);
  if (thread == 0) CopyOut(y, static_cast<int>(first_row), column, results);
}

}  // namespace any4
