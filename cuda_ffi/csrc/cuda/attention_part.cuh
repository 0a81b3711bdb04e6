// The attention of a block of threads over its share of the slots of one key and value head.
//
// A tile is 32 slots, and belongs to one warp, which copies the tile's keys and values to shared memory and multiplies
// them on tensor cores by the queries, and by the weights, of up to eight heads at once. No other warp waits for it. In
// shared memory, pieces of 16 bytes are shuffled within a few rows so that eight rows of a matrix lie in different banks.
#pragma once

#include <cuda_pipeline.h>

#include "attention.h"
#include "attention_numbers.cuh"

namespace any4 {
namespace {

constexpr int kTile = 32, kMostThreads = 256;
// The score of nothing, in powers of two.
constexpr float kNothing = -1e30f;
constexpr float kLog2e = 1.4426950408889634f;
constexpr unsigned kAll = 0xFFFFFFFFu;

constexpr int kHeads = 8;

// How shared memory is laid out, for channels up to kSize.
template <int kSize>
struct PartOf {
  static constexpr int kPieces = kSize / 8;         // of 16 bytes that a lane copies of a tile's keys, or values
  static constexpr int kTilePieces = 32 * kPieces;  // of a tile's keys, or values
  static constexpr int kRowLanes = kSize / 8;       // lanes side by side on the values of a slot
  static constexpr int kRows = 32 / kRowLanes;      // slots whose values are copied at once
  static constexpr int kSteps = kSize / 16;         // of 16 channels
  static constexpr int kQuery = kSize + 8;          // elements from one head's query to the next
  static constexpr int kFound = 2 * kHeads;         // floats of a warp: the highest scores, then the totals

  static int SharedBytes(int warps) {
    return warps * (2 * kTilePieces * 16 + kFound * 4) + (kHeads * kQuery + 2 * kSize) * 2;
  }
};

// Which slots a block's row sees, and where its new token goes.
struct Seen {
  int first, last, at;

  __device__ Seen(const AttentionStep& step, int row) {
    const int own = step.positions[row] + step.start[row];
    at = min(max(own, 0), step.slots - 1);
    first = max(step.start[row], 0);
    if (step.window > 0) first = max(first, own - step.window + 1);
    last = min(own, step.slots - 1);
  }
  __device__ bool Sees(int slot) const { return slot >= first && slot <= last; }
};

// A channel pair (i, i + size / 2), rotated in float32 and rounded, without fused operations: as plain code rounds it.
template <typename T>
__device__ __forceinline__ void RotatePair(const AttentionStep& step, int row, const T* from, int i, T& low, T& high) {
  const int half = step.size / 2;
  low = from[i], high = from[i + half];
  if (step.cos == nullptr) return;
  const float a = static_cast<float>(low), b = static_cast<float>(high);
  const float cos = __ldg(step.cos + row * half + i), sin = __ldg(step.sin + row * half + i);
  low = static_cast<T>(__fsub_rn(__fmul_rn(a, cos), __fmul_rn(b, sin)));
  high = static_cast<T>(__fadd_rn(__fmul_rn(b, cos), __fmul_rn(a, sin)));
}

// Fills `queries` [kHeads, kQuery] with the rotated queries of the heads from `head` on, and new_key and new_value.
template <typename T, int kSize>
__device__ void LoadToken(const AttentionStep& step, int row, int group, int head, int stop, T* queries, T* new_key,
                          T* new_value) {
  constexpr int kHalf = kSize / 2, kQuery = PartOf<kSize>::kQuery;
  const int half = step.size / 2;
  const int64_t token = (static_cast<int64_t>(row) * step.groups + group) * step.size;
  for (int o = threadIdx.x; o < (kHeads + 1) * kHalf; o += blockDim.x) {
    const int g = o / kHalf, i = o % kHalf;
    if (i >= half) continue;
    T low = 0.0f, high = 0.0f;
    if (g == kHeads) {
      RotatePair(step, row, static_cast<const T*>(step.new_keys) + token, i, low, high);
      new_key[i] = low, new_key[i + half] = high;
      continue;
    }
    if (head + g < stop) {
      const int64_t query = (static_cast<int64_t>(row) * step.heads + head + g) * step.size;
      RotatePair(step, row, static_cast<const T*>(step.queries) + query, i, low, high);
    }
    queries[g * kQuery + i] = low, queries[g * kQuery + i + half] = high;
  }
  for (int i = threadIdx.x; i < step.size; i += blockDim.x) {
    new_value[i] = static_cast<const T*>(step.new_values)[token + i];
  }
}

// A warp's tiles in shared memory, and the copies to them.
template <typename T, int kSize>
class Tiles {
 public:
  using Of = PartOf<kSize>;

  __device__ Tiles(const AttentionStep& step, const Seen& seen, int64_t pair, uint4* stage)
      : seen_(seen), size_(step.size), slots_(step.slots), lane_(threadIdx.x % 32), staged_keys_(stage),
        staged_values_(stage + Of::kTilePieces),
        keys_(static_cast<const T*>(step.keys) + (pair * size_ + lane_ / 4) * slots_),
        values_(static_cast<const T*>(step.values) + pair * slots_ * size_ + 8 * (lane_ % Of::kRowLanes)) {}

  // The place of channels 8 i to 8 i + 7, of which it is number r, in slots 8 s to 8 s + 7.
  __device__ uint4* Keys(int i, int r, int s) const { return staged_keys_ + i * 32 + r * 4 + (s ^ (r >> 1 & 3)); }
  // The place of channels 8 p to 8 p + 7 of a slot.
  __device__ uint4* Values(int slot, int p) const { return staged_values_ + slot * Of::kRowLanes + (p ^ (slot & 7)); }

  // Slots that aren't seen become zeros, without a read where a piece has no other.
  __device__ void FetchKeys(int tile) {
    const int slot = tile * kTile + 8 * (lane_ % 4);
    const bool any = slot <= seen_.last && slot + 7 >= seen_.first;
    const T* const from = keys_ + (any ? slot : 0);
#pragma unroll
    for (int i = 0; i < Of::kPieces; ++i) {
      if (8 * i >= size_) break;
      __pipeline_memcpy_async(Keys(i, lane_ / 4, lane_ % 4), from + static_cast<int64_t>(8 * i) * slots_, 16,
                              any ? 0 : 16);
    }
  }

  __device__ void FetchValues(int tile) {
    const bool inside = 8 * (lane_ % Of::kRowLanes) < size_;
#pragma unroll
    for (int i = 0; i < Of::kPieces; ++i) {
      const int row = i * Of::kRows + lane_ / Of::kRowLanes, slot = tile * kTile + row;
      const bool any = inside && seen_.Sees(slot);
      const T* const from = values_ + (any ? static_cast<int64_t>(slot) * size_ : 0);
      __pipeline_memcpy_async(Values(row, lane_ % Of::kRowLanes), from, 16, any ? 0 : 16);
    }
  }

  // Puts the new key into the pieces that this lane copied, once they have arrived: the cache may not hold it yet.
  __device__ void PatchKeys(int tile, const T* new_key) {
    if (!Patches(tile) || seen_.at % kTile / 8 != lane_ % 4) return;
    for (int i = 0; 8 * i < size_; ++i) {
      reinterpret_cast<T*>(Keys(i, lane_ / 4, lane_ % 4))[seen_.at % 8] = new_key[lane_ / 4 + 8 * i];
    }
  }

  __device__ void PatchValues(int tile, const T* new_value) {
    const int row = seen_.at % kTile, p = lane_ % Of::kRowLanes;
    if (!Patches(tile) || row % Of::kRows != lane_ / Of::kRowLanes || 8 * p >= size_) return;
    *Values(row, p) = *reinterpret_cast<const uint4*>(new_value + 8 * p);
  }

 private:
  __device__ bool Patches(int tile) const { return seen_.at / kTile == tile && seen_.Sees(seen_.at); }

  const Seen& seen_;
  const int size_, slots_, lane_;
  uint4* const staged_keys_;
  uint4* const staged_values_;
  const T* const keys_;
  const T* const values_;
};

// A warp's softmax so far, over its tiles. Its sums are divided by 2^highest. Lane l has the scores of head l / 4 for
// the slots 2 (l % 4) and 2 (l % 4) + 1 of each eight, and the sums of the heads with these numbers for the channels
// l / 4 and l / 4 + 8 of each sixteen.
template <typename T, int kSize>
struct Running {
  using Of = PartOf<kSize>;

  uint32_t query[Of::kSteps][2];
  float highest = kNothing;  // the highest score, in powers of two
  float total = 0;           // of this lane's slots
  float mixed[Of::kSteps][4] = {};

  __device__ explicit Running(const T* queries) {
    const int lane = threadIdx.x % 32;
    const T* const from = queries + lane / 4 * Of::kQuery + 2 * (lane % 4);
#pragma unroll
    for (int k = 0; k < Of::kSteps; ++k) {
      query[k][0] = *reinterpret_cast<const uint32_t*>(from + 16 * k);
      query[k][1] = *reinterpret_cast<const uint32_t*>(from + 16 * k + 8);
    }
  }

  __device__ void Products(const Tiles<T, kSize>& tiles, int size, float (&scores)[4][4]) const {
    const int number = threadIdx.x % 32 / 8, r = threadIdx.x % 8;
#pragma unroll
    for (int k = 0; k < Of::kSteps; ++k) {
      if (16 * k >= size) break;
      // Rows of the other eight heads, of which there are none.
      const uint32_t a[4] = {query[k][0], 0, query[k][1], 0};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t keys[4];
        LoadTransposed(tiles.Keys(2 * k + number % 2, r, 2 * half + number / 2), keys);
        MultiplyAdd<T>(scores[2 * half], a, keys[0], keys[1]);
        MultiplyAdd<T>(scores[2 * half + 1], a, keys[2], keys[3]);
      }
    }
  }

  // Turns products into weights, and fades what was mixed before.
  __device__ void Weigh(const AttentionStep& step, const Seen& seen, int tile, float (&scores)[4][4]) {
    const int lane = threadIdx.x % 32;
    float most = highest;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& score = scores[i / 2][i % 2];
      score *= step.scale;
      if (step.softcap > 0) score = step.softcap * tanhf(score / step.softcap);
      score = seen.Sees(tile * kTile + i / 2 * 8 + 2 * (lane % 4) + i % 2) ? score * kLog2e : kNothing;
      most = fmaxf(most, score);
    }
    most = fmaxf(most, __shfl_xor_sync(kAll, most, 1));
    most = fmaxf(most, __shfl_xor_sync(kAll, most, 2));
    const float fade = exp2f(highest - most);
    highest = most;
    total *= fade;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& score = scores[i / 2][i % 2];
      score = score == kNothing ? 0 : exp2f(score - most);
      total += score;
    }
    const float fades[2] = {__shfl_sync(kAll, fade, 8 * (lane % 4)), __shfl_sync(kAll, fade, 8 * (lane % 4) + 4)};
#pragma unroll
    for (int t = 0; t < Of::kSteps; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) mixed[t][i] *= fades[i % 2];
    }
  }

  __device__ void Mix(const Tiles<T, kSize>& tiles, int size, const float (&weights)[4][4]) {
    const int number = threadIdx.x % 32 / 8, r = threadIdx.x % 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Split<T> first(weights[2 * half][0], weights[2 * half][1]);
      const Split<T> second(weights[2 * half + 1][0], weights[2 * half + 1][1]);
#pragma unroll
      for (int t = 0; t < Of::kSteps; ++t) {
        if (16 * t >= size) break;
        uint32_t values[4];
        LoadTransposed(tiles.Values(16 * half + 8 * (number / 2) + r, 2 * t + number % 2), values);
        MultiplyAdd<T>(mixed[t], values, first.high, second.high);
        MultiplyAdd<T>(mixed[t], values, first.low, second.low);
      }
    }
  }

  // Leaves the sums [kHeads, kSize], and in `found` the highest scores and the totals.
  __device__ void Leave(int size, float* sums, float* found) {
    const int lane = threadIdx.x % 32;
    total += __shfl_xor_sync(kAll, total, 1);
    total += __shfl_xor_sync(kAll, total, 2);
    if (lane % 4 == 0) found[lane / 4] = highest, found[kHeads + lane / 4] = total;
#pragma unroll
    for (int t = 0; t < Of::kSteps; ++t) {
      if (16 * t >= size) break;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[(2 * (lane % 4) + i % 2) * kSize + 16 * t + lane / 4 + i / 2 * 8] = mixed[t][i];
      }
    }
  }
};

}  // namespace
}  // namespace any4
