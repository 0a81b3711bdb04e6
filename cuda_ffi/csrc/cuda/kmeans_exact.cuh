// The optimal clusters of a sorted row, by dynamic programming over the number of clusters.
//
// before[i] is the least error of the first i values in m - 1 clusters; layer m's is min over i <= j of before[i] plus
// the error of [i, j]. That error satisfies the quadrangle inequality, so the best i never decreases with j (Wu,
// "Optimal quantization by matrix searching", 1991; Gronlund et al., "Fast exact k-means, k-medians and Bregman
// divergence clustering in 1D", 2017), nor with m. First comes the best i for the last value of every block of 32: each
// warp takes a run of blocks and finds that of its last block; when all warps have theirs, they find the others by
// divide and conquer. For any other value of a block, the best i lies between those of the last values of the block
// before and of its own block: all of these are tried, for 32 values at a time. Where rounding exchanges near-equal
// candidates, no more than the rounding is lost.
#pragma once

#include "kmeans_table.cuh"

namespace any4 {
namespace {

// The error of joining two intervals, besides their own errors. The reciprocal is good to one unit in the last place,
// and its operand lies between 1e-9 and 1e31: there are no denormals, for which __fdividef takes three more
// instructions.
__device__ float JoinError(float distance, float share, float other_distance, float other_share) {
  const float apart = distance + other_distance;
  float weight;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(weight) : "f"(share + other_share));
  return apart * apart * weight;
}

// Adds a value to others at or below it (Welford, 1962), all measured from one point.
__device__ void Add(Part& part, double distance, float weight) { part = Join(part, {weight, distance, 0}); }

// For a lane's value j of block `own`: calls offer(i, error of [i, j]) for the i of that block, descending to `low`.
template <class Offer>
__device__ void ForOwnBlock(const Slot& slot, int own, int low, const Offer& offer) {
  const int lane = threadIdx.x % 32;
  const float x = slot.x[own + lane], w = slot.w[own + lane];
  Part part{0, 0, 0};
  for (int t = kLanes - 1; t >= max(low - own, 0); --t) {
    const float other_x = __shfl_sync(kAll, x, t), other_w = __shfl_sync(kAll, w, t);
    if (t <= lane) {
      Add(part, static_cast<double>(x) - other_x, other_w);
      offer(own + t, static_cast<float>(part.error));
    }
  }
}

// The blocks that FindStart takes at once, and the candidates that FillLayer does.
constexpr int kAtOnce = 4, kTurn = 8;

__device__ int Level(int block, int other) { return 31 - __clz(block ^ other); }

// The i in [low, high] with the least before[i] + error of [i, j], the smallest of equals; all lanes of a warp get it.
// within: the error of [i, j] for the lane's i of j's block, infinite after j.
__device__ int FindStart(const Slot& slot, const float* before, int j, float within, int low, int high) {
  const int lane = threadIdx.x % 32, own = j / kLanes;
  float least = CUDART_INF_F;
  int found = high;
  const int stop = min(high / kLanes + 1, own);
  // Past the end, the last block is tried again: so all loads are in flight at once, without branches.
  for (int begin = low / kLanes; begin < stop; begin += kAtOnce) {
#pragma unroll
    for (int turn = 0; turn < kAtOnce; ++turn) {
      const int block = min(begin + turn, stop - 1), i = block * kLanes + lane;
      const Moments cut = slot.cut + Level(block, own) * slot.size;
      const float joined = JoinError(cut.distance[i], cut.share[i], cut.distance[j], cut.share[j]);
      const float total = before[i] + cut.error[i] + joined + cut.error[j];
      if (total < least) {
        least = total;
        found = i;
      }
    }
  }
  if (high >= own * kLanes) {
    const float total = before[own * kLanes + lane] + within;
    if (total < least) {
      least = total;
      found = own * kLanes + lane;
    }
  }
  // The bits of floats that are not negative have the order of the floats.
  const unsigned best = __reduce_min_sync(kAll, __float_as_uint(least));
  const int index = __reduce_min_sync(kAll, __float_as_uint(least) == best ? found : high);
  // Candidates outside the bounds, in the blocks of the bounds, may be as good, but rounding must not exchange the
  // starts of two blocks.
  return min(max(index, low), high);
}

__device__ int FindBlockStart(const Slot& slot, const float* before, int block, int low, int high) {
  const int j = block * kLanes + kLanes - 1;
  const float within = slot.to_block_end[block * kLanes + threadIdx.x % 32];
  return FindStart(slot, before, j, within, min(low, high), high);
}

// Finds the best starts of the intervals that end with each block. earlier: those of the layer before.
__device__ void BlockStarts(const Slot& slot, const float* before, const int* earlier, int* starts) {
  const int warp = threadIdx.x / 32;
  const auto put = [&](int block, int start) {
    if (threadIdx.x % 32 == 0) starts[block] = start;
    __syncwarp();
  };
  const int first = slot.blocks * warp / kWarps, stop = slot.blocks * (warp + 1) / kWarps;
  if (first < stop) {
    put(stop - 1, FindBlockStart(slot, before, stop - 1, earlier[stop - 1], stop * kLanes - 1));
  }
  __syncthreads();
  int stride = 1;
  while (stride < stop - first) stride *= 2;
  for (stride /= 2; stride > 0; stride /= 2) {
    for (int b = first + stride - 1; b < stop - 1; b += 2 * stride) {
      const int low = b >= stride ? starts[max(b - stride, first - 1)] : 0;
      const int high = starts[min(b + stride, stop - 1)];
      put(b, FindBlockStart(slot, before, b, max(low, earlier[b]), min(high, b * kLanes + kLanes - 1)));
    }
  }
  __syncthreads();
}

struct Candidate {
  float error, distance, share, unused;
};

// Fills the layer that follows `before`, one place further: after[j + 1] for every j. next: a counter at zero.
__device__ void FillLayer(const Slot& slot, const float* before, const int* starts, float* after, Candidate* tile,
                          int* next) {
  const int lane = threadIdx.x % 32;
  if (threadIdx.x == 0) after[0] = 0;
  const auto take = [&] { return __shfl_sync(kAll, lane == 0 ? atomicAdd(next, 1) : 0, 0); };
  for (int b = take(); b < slot.blocks; b = take()) {
    // The ends of two warps' runs are found independently, and may be exchanged where candidates are equal but for
    // rounding.
    const int start = starts[b], previous = b > 0 ? starts[b - 1] : 0, own = b * kLanes;
    const int low = min(previous, start), high = max(previous, start);
    float least = CUDART_INF_F, run_least = CUDART_INF_F, error = 0, distance = 0, share = 0;
    int level = -1;
    const int stop = min(high / kLanes + 1, b);
    for (int block = low / kLanes; block < stop; ++block) {
      const int q = Level(block, b), i = block * kLanes + lane;
      const Moments cut = slot.cut + q * slot.size;
      if (q != level) {
        least = fminf(least, run_least + error);
        run_least = CUDART_INF_F;
        level = q;
        error = cut.error[own + lane];
        distance = cut.distance[own + lane];
        share = cut.share[own + lane];
      }
      __syncwarp();
      tile[lane] = {before[i] + cut.error[i], cut.distance[i], cut.share[i], 0};
      __syncwarp();
      // Whole turns, which hide each other's latency: a candidate or two beyond the bounds do no harm.
      const int end = min(high - block * kLanes + 1, kLanes);
      for (int begin = max(low - block * kLanes, 0) / kTurn * kTurn; begin < end; begin += kTurn) {
#pragma unroll
        for (int t = begin; t < begin + kTurn; ++t) {
          const Candidate c = tile[t];
          run_least = fminf(run_least, c.error + JoinError(c.distance, c.share, distance, share));
        }
      }
    }
    least = fminf(least, run_least + error);
    if (high >= own) {
      ForOwnBlock(slot, own, low, [&](int i, float within) {
        if (i <= high) least = fminf(least, before[i] + within);
      });
    }
    after[own + lane + 1] = least;
  }
  __syncthreads();
}

// Finds the clusters of the slot's row, at most layers + 1, by one warp. Returns their number, and fills `firsts` with
// the index of each cluster's first value, beginning with the last cluster.
__device__ int Backtrack(const Slot& slot, int* firsts) {
  const int lane = threadIdx.x % 32;
  int count = 0, last = slot.length - 1;
  for (int m = slot.layers - 1; m >= 0 && last >= 0; --m) {
    const float* const before = slot.before + int64_t{m} * slot.stride;
    const int b = last / kLanes, own = b * kLanes;
    // The topmost layer has no starts of its own.
    const bool solved = m + 1 < slot.layers;
    const int* const starts = slot.starts + (solved ? m + 1 : m) * slot.blocks;
    const int low = b > 0 ? starts[b - 1] : 0, high = solved ? min(starts[b], last) : last;
    float within = CUDART_INF_F;
    if (high >= own) {
      // Each lane adds the values from `last` down to its own.
      Part part{0, 0, 0};
      for (int j = last; j >= own; --j) {
        if (own + lane <= j) Add(part, static_cast<double>(slot.x[last]) - slot.x[j], slot.w[j]);
      }
      if (own + lane <= last) within = static_cast<float>(part.error);
    }
    const int start = FindStart(slot, before, last, within, min(low, high), high);
    if (lane == 0) firsts[count] = start;
    ++count;
    last = start - 1;
  }
  if (last >= 0) {
    if (lane == 0) firsts[count] = 0;
    ++count;
  }
  __syncwarp();
  return count;
}

// Fills `before` for all layers, and `starts`.
__device__ void SolveLayers(const Slot& slot, Candidate* tile, int* next) {
  for (int b = threadIdx.x; b < slot.blocks; b += kThreads) slot.starts[b] = 0;
  if (slot.layers > 0) {
    if (threadIdx.x == 0) slot.before[0] = 0;
    for (int i = threadIdx.x; i < slot.size; i += kThreads) slot.before[i + 1] = slot.head.error[i];
  }
  __syncthreads();
  for (int m = 0; m + 1 < slot.layers; ++m) {
    const float* const before = slot.before + int64_t{m} * slot.stride;
    const int* const earlier = slot.starts + m * slot.blocks;
    int* const starts = slot.starts + (m + 1) * slot.blocks;
    if (threadIdx.x == 0) *next = 0;
    BlockStarts(slot, before, earlier, starts);
    FillLayer(slot, before, starts, slot.before + int64_t{m + 1} * slot.stride, tile, next);
  }
}

}  // namespace
}  // namespace any4
