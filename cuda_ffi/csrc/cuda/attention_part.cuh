// How a block of threads holds its share of the slots of one key and value head, and the new token.
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

constexpr int kTile = 32;
// The score of nothing, in powers of two.
constexpr float kNothing = -1e30f;
constexpr float kLog2e = 1.4426950408889634f;
constexpr unsigned kAll = 0xFFFFFFFFu;

constexpr int kHeads = 8;
// Floats that a warp leaves beside its sums: the highest scores, the totals, and what it counts for.
constexpr int kFound = 3 * kHeads;

// How shared memory is laid out, for channels up to kSize. Those beyond the real size are zeros: branches around them
// would keep a product's loads from overlapping the one before it.
template <int kSize>
struct PartOf {
  static constexpr int kThreads = kSize <= 128 ? 384 : 192;  // at most; more would not fit in shared memory
  static constexpr int kPieces = kSize / 8;         // of 16 bytes that a lane copies of a tile's keys, or values
  static constexpr int kTilePieces = 32 * kPieces;  // of a tile's keys, or values
  static constexpr int kRowLanes = kSize / 8;       // lanes side by side on the values of a slot
  static constexpr int kRows = 32 / kRowLanes;      // slots whose values are copied at once
  static constexpr int kSteps = kSize / 16;         // of 16 channels
  static constexpr int kQuery = kSize + 8;          // elements from one head's query to the next
  static constexpr int kQuads = kHeads * kSize / 4;  // of the results

  // Of `PartSums`: the quads, of which a part may have one more than its share, and two numbers a head of each part.
  static constexpr int kPushed = 4 * (kQuads + kMostParts) + kMostParts * 2 * kHeads;

  static int SharedBytes(int warps) {
    return warps * (2 * kTilePieces * 16 + kFound * 4) + (kHeads * kQuery + 2 * kSize) * 2 + kPushed * 4;
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

// The queries of kHeads heads and the new key, as pairs of channels (i, i + size / 2), and the new value. What a thread
// has of them is loaded before it asks for tiles, and stored, rotated, while these are under way.
template <typename T, int kSize>
class Token {
 public:
  __device__ Token(const AttentionStep& step, int row, int group, int head, int stop)
      : step_(step), row_(row), head_(head), stop_(stop), token_(row * int64_t{step.groups} + group) {
#pragma unroll
    for (int n = 0; n < kHeld; ++n) held_[n] = Load(n * blockDim.x + threadIdx.x);
  }

  // Fills `queries` [kHeads, kQuery], and new_key and new_value [kSize], with zeros beyond the channels and heads.
  __device__ void Store(T* queries, T* new_key, T* new_value) const {
#pragma unroll
    for (int n = 0; n < kHeld; ++n) Store(held_[n], n * blockDim.x + threadIdx.x, queries, new_key);
    for (int o = kHeld * blockDim.x + threadIdx.x; o < kPairs; o += blockDim.x) Store(Load(o), o, queries, new_key);
    const T* const from = static_cast<const T*>(step_.new_values) + token_ * step_.size;
    for (int i = threadIdx.x; i < kSize; i += blockDim.x) {
      new_value[i] = i < step_.size ? from[i] : static_cast<T>(0.0f);
    }
  }

 private:
  struct Pair {
    T low, high;
    float cos, sin;
  };
  static constexpr int kHalf = kSize / 2, kPairs = (kHeads + 1) * kHalf;
  static constexpr int kHeld = (kPairs + PartOf<kSize>::kThreads - 1) / PartOf<kSize>::kThreads;

  __device__ Pair Load(int o) const {
    const int g = o / kHalf, i = o % kHalf, half = step_.size / 2;
    Pair pair{0.0f, 0.0f, 1.0f, 0.0f};
    if (i >= half || g > kHeads || (g < kHeads && head_ + g >= stop_)) return pair;
    const T* const from = g == kHeads ? static_cast<const T*>(step_.new_keys) + token_ * step_.size
                                      : static_cast<const T*>(step_.queries) +
                                            (row_ * int64_t{step_.heads} + head_ + g) * step_.size;
    pair.low = from[i], pair.high = from[i + half];
    if (step_.cos == nullptr) return pair;
    pair.cos = __ldg(step_.cos + row_ * half + i), pair.sin = __ldg(step_.sin + row_ * half + i);
    return pair;
  }

  // Rotated in float32 and rounded, without fused operations: as plain code rounds it.
  __device__ void Store(Pair pair, int o, T* queries, T* new_key) const {
    const int g = o / kHalf, i = o % kHalf, half = step_.size / 2;
    if (g > kHeads) return;
    if (step_.cos != nullptr) {
      const float a = static_cast<float>(pair.low), b = static_cast<float>(pair.high);
      pair.low = static_cast<T>(__fsub_rn(__fmul_rn(a, pair.cos), __fmul_rn(b, pair.sin)));
      pair.high = static_cast<T>(__fadd_rn(__fmul_rn(b, pair.cos), __fmul_rn(a, pair.sin)));
    }
    T* const to = g == kHeads ? new_key : queries + g * PartOf<kSize>::kQuery;
    // Pairs that there are none of are the zeros beyond the channels.
    const bool real = i < half;
    to[real ? i : i + half] = pair.low, to[real ? i + half : i + kHalf] = pair.high;
  }

  const AttentionStep& step_;
  const int row_, head_, stop_;
  const int64_t token_;
  Pair held_[kHeld];
};

// A warp's tiles in shared memory, and the copies to them.
template <typename T, int kSize>
class Tiles {
 public:
  using Of = PartOf<kSize>;

  __device__ Tiles(const AttentionStep& step, const Seen& seen, int64_t pair, uint4* stage)
      : seen_(seen), size_(step.size), slots_(step.slots), lane_(threadIdx.x % 32), staged_keys_(stage),
        staged_values_(stage + Of::kTilePieces),
        keys_(static_cast<const T*>(step.keys) + (pair * size_ + lane_ / 4) * slots_),
        values_(static_cast<const T*>(step.values) + pair * slots_ * size_ +
                min(8 * (lane_ % Of::kRowLanes), size_ - 8)) {}

  // The place of channels 8 i to 8 i + 7, of which it is number r, in slots 8 s to 8 s + 7.
  __device__ uint4* Keys(int i, int r, int s) const { return staged_keys_ + i * 32 + r * 4 + (s ^ (r >> 1 & 3)); }
  // The place of channels 8 p to 8 p + 7 of a slot.
  __device__ uint4* Values(int slot, int p) const { return staged_values_ + slot * Of::kRowLanes + (p ^ (slot & 7)); }

  // Slots that aren't seen become zeros, without a read where a piece has no other.
  __device__ void FetchKeys(int tile) {
    const int slot = tile * kTile + 8 * (lane_ % 4);
    const bool any = slot <= seen_.last && slot + 7 >= seen_.first;
    const T* from = keys_ + (any ? slot : 0);
    const int64_t next = int64_t{8} * slots_;
#pragma unroll
    for (int i = 0; i < Of::kPieces; ++i) {
      const bool real = any && 8 * i < size_;
      __pipeline_memcpy_async(Keys(i, lane_ / 4, lane_ % 4), real ? from : keys_, 16, real ? 0 : 16);
      from += next;
    }
  }

  __device__ void FetchValues(int tile) {
    const bool inside = 8 * (lane_ % Of::kRowLanes) < size_;
    const T* from = values_ + (int64_t{tile} * kTile + lane_ / Of::kRowLanes) * size_;
#pragma unroll
    for (int i = 0; i < Of::kPieces; ++i) {
      const int row = i * Of::kRows + lane_ / Of::kRowLanes;
      const bool real = inside && seen_.Sees(tile * kTile + row);
      __pipeline_memcpy_async(Values(row, lane_ % Of::kRowLanes), real ? from : values_, 16, real ? 0 : 16);
      from += Of::kRows * size_;
    }
  }

  // Puts the new key into the pieces that this lane copied, once they have arrived: the cache may not hold it yet.
  __device__ void PatchKeys(int tile, const T* new_key) {
    if (!Patches(tile) || seen_.at % kTile / 8 != lane_ % 4) return;
#pragma unroll
    for (int i = 0; i < Of::kPieces; ++i) {
      reinterpret_cast<T*>(Keys(i, lane_ / 4, lane_ % 4))[seen_.at % 8] = new_key[lane_ / 4 + 8 * i];
    }
  }

  __device__ void PatchValues(int tile, const T* new_value) {
    const int row = seen_.at % kTile, p = lane_ % Of::kRowLanes;
    if (!Patches(tile) || row % Of::kRows != lane_ / Of::kRowLanes) return;
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

}  // namespace
}  // namespace any4
