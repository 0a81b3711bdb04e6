// The squared errors of all intervals of a sorted row, in float32 without cancellation.
// any4_jax/clustering/intervals.py explains the idea: an interval is cut at a point that depends only on its ends, and
// the moments of its parts are kept as distances from that point, which are sums of terms of one sign. The smallest
// segments are blocks of a warp's 32 values.
#pragma once

#include "kmeans_slot.cuh"

namespace any4 {
namespace {

// The moments of some neighbouring values; the mean is measured from a point near them. In double, since such means are
// subtracted from each other: float32 would lose clusters that are much tighter than a block is wide.
struct Part {
  double weight, mean, error;
};

__device__ Part Join(const Part& a, const Part& b) {
  const double weight = a.weight + b.weight;
  const double part = b.weight / fmax(weight, static_cast<double>(kEmpty));
  const double step = b.mean - a.mean;
  return {weight, a.mean + step * part, a.error + b.error + a.weight * part * step * step};
}

__device__ void StorePart(const Growing& all, int j, const Part& part, double distance) {
  all.error[j] = static_cast<float>(part.error);
  all.distance[j] = static_cast<float>(fmax(distance, 0.0));
  all.share[j] = 1.0f / fmaxf(static_cast<float>(part.weight), kEmpty);
  all.weight[j] = static_cast<float>(part.weight);
}

// Fills heads, tails and the errors to the end of a block; each warp takes a block at a time.
__device__ void BlockMoments(const Slot& slot) {
  const int lane = threadIdx.x % 32;
  for (int b = threadIdx.x / 32; b < slot.blocks; b += kWarps) {
    const int start = b * kLanes, j = start + lane;
    const double origin = slot.x[start];
    Part head{slot.w[j], slot.x[j] - origin, 0}, tail = head;
    for (int step = 1; step < kLanes; step *= 2) {
      const Part before{__shfl_up_sync(kAll, head.weight, step), __shfl_up_sync(kAll, head.mean, step),
                        __shfl_up_sync(kAll, head.error, step)};
      const Part after{__shfl_down_sync(kAll, tail.weight, step), __shfl_down_sync(kAll, tail.mean, step),
                       __shfl_down_sync(kAll, tail.error, step)};
      if (lane >= step) head = Join(before, head);
      if (lane + step < kLanes) tail = Join(tail, after);
    }
    StorePart(slot.head, j, head, head.mean);
    StorePart(slot.tail, j, tail, slot.x[start + kLanes] - origin - tail.mean);
    slot.to_block_end[j] = static_cast<float>(tail.error);
  }
}

// Joins another interval, `near`, to the interval of position j, on the side of the new reference point. The mean of
// `near` lies near_distance from that point and near_from_old from the old one; the two points lie `gap` apart.
__device__ void Grow(const Growing& all, int j, float near_weight, float near_error, float near_distance,
                     float near_from_old, float gap) {
  const float weight = all.weight[j], distance = all.distance[j];
  const float total = weight + near_weight;
  const float share = 1.0f / fmaxf(total, kEmpty);
  const float part = weight * share;
  const float apart = distance + near_from_old;
  all.error[j] = all.error[j] + near_error + part * near_weight * apart * apart;
  all.distance[j] = near_weight * share * near_distance + part * (gap + distance);
  all.share[j] = share;
  all.weight[j] = total;
}

// Fills all that x and w determine in the slot.
__device__ void BuildTable(const Slot& slot) {
  BlockMoments(slot);
  Moments cut = slot.cut;
  for (int half = kLanes; half < slot.size; half *= 2, cut = cut + slot.size) {
    for (int j = threadIdx.x; j < slot.size; j += kThreads) {
      const Growing& from = j & half ? slot.head : slot.tail;
      cut.error[j] = from.error[j];
      cut.distance[j] = from.distance[j];
      cut.share[j] = from.share[j];
    }
    __syncthreads();
    // No thread writes what others read here of head, tail and cut before the next level's barrier.
    for (int j = threadIdx.x; j < slot.size; j += kThreads) {
      const int start = j & ~(2 * half - 1), middle = start + half, end = min(middle + half, slot.size);
      if (j & half) {
        Grow(slot.head, j, slot.head.weight[middle - 1], slot.head.error[middle - 1], slot.head.distance[middle - 1],
             cut.distance[start], slot.x[middle] - slot.x[start]);
      } else if (middle + half <= slot.size) {
        // A segment that the row's end cuts short is never the first half of a larger one, so it needs no tail.
        Grow(slot.tail, j, slot.tail.weight[middle], slot.tail.error[middle], slot.tail.distance[middle],
             cut.distance[end - 1], slot.x[end] - slot.x[middle]);
      }
    }
  }
  __syncthreads();
}

}  // namespace
}  // namespace any4
