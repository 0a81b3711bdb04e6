// Squared errors of all intervals of a sorted row, in float32 without cancellation. any4_jax/clustering/intervals.py
// has the idea: an interval is cut at a point that depends only on its ends, and the moments of both parts are kept as
// distances from that point, which are sums of terms of one sign.
//
// Here the smallest segments are blocks of 16 values, so the intervals of neighbouring lanes are always cut at the same
// point. Errors within a block are computed on demand, since few are needed.
#pragma once

#include "lanes_inl.h"
#include "scratch.h"

namespace any4 {
namespace {

// Stands in for an empty weight in denominators; the heaviest weight lies in [1, 2).
constexpr float kEmpty = 1e-30f;

// For the intervals from each position to one reference point, what joining two intervals takes: the squared error, the
// distance of the mean from that point, and 1 / weight.
struct Moments {
  float* error;
  float* distance;
  float* share;

  void Take(Scratch& scratch, int64_t count) {
    error = scratch.Take<float>(count);
    distance = scratch.Take<float>(count);
    share = scratch.Take<float>(count);
  }
};

// Moments while their intervals grow.
struct Growing {
  Moments moments;
  float* weight;

  void Take(Scratch& scratch, int64_t count) {
    moments.Take(scratch, count);
    weight = scratch.Take<float>(count);
  }
};

// Adds values one after another, each at or beyond the last one (Welford, 1962). The sums are doubles: if weights
// differ by many decades, float32 would lose the light end of an interval.
struct Welford {
  double weight = 0, mean = 0, error = 0;

  void Add(double value, double value_weight) {
    const double total = weight + value_weight;
    const double part = value_weight / (total > kEmpty ? total : kEmpty);
    const double step = value - mean;
    mean += step * part;
    error += weight * part * step * step;
    weight = total;
  }
};

constexpr int kMaxLevels = 28;

struct IntervalTable {
  int64_t blocks;
  const float* x;  // [16 * blocks + 1], the last value repeated
  const float* w;  // [16 * blocks], 0 past the row's end
  // cut[q]: for the interval from each position to the middle of its segment of 2^(q + 1) blocks, measured from there.
  Moments cut[kMaxLevels];
  const float* from_start;    // [16 * blocks], the errors of [0, j]
  const float* to_block_end;  // [16 * blocks], the errors of [j, end of j's block]

  // The errors of [i, j] for every j of i's block; infinite before i.
  Floats FromWithinBlock(int64_t i) const {
    float errors[kLanes];
    const int first = static_cast<int>(i % kLanes);
    Welford sums;
    for (int lane = 0; lane < kLanes; ++lane) {
      if (lane >= first) sums.Add(double{x[i - first + lane]} - x[i], w[i - first + lane]);
      errors[lane] = lane < first ? __builtin_inff() : static_cast<float>(sums.error);
    }
    return Load(errors);
  }

  // The errors of [i, j] for every i of j's block; infinite after j.
  void ToWithinBlock(int64_t j, float* errors) const {
    const int last = static_cast<int>(j % kLanes);
    Welford sums;
    for (int lane = kLanes - 1; lane >= 0; --lane) {
      if (lane <= last) sums.Add(double{x[j]} - x[j - last + lane], w[j - last + lane]);
      errors[lane] = lane > last ? __builtin_inff() : static_cast<float>(sums.error);
    }
  }
};

// Joins one interval, `near`, to each of the intervals [begin, end) beyond it. The mean of `near` lies near_distance
// from its own reference point and near_from_middle from theirs; the two reference points lie `gap` apart.
inline void Grow(const Growing& all, int64_t begin, int64_t end, float near_weight, float near_error,
                 float near_distance, float near_from_middle, float gap) {
  for (int64_t j = begin; j < end; j += kLanes) {
    const Floats weight = Load(all.weight + j), distance = Load(all.moments.distance + j);
    const Floats total = weight + All(near_weight);
    const Floats share = Divide(All(1), total);
    const Floats part = weight * share;
    const Floats apart = distance + All(near_from_middle);
    Store(all.moments.error + j,
          Load(all.moments.error + j) + All(near_error) + part * All(near_weight) * apart * apart);
    Store(all.moments.distance + j, All(near_weight * near_distance) * share + part * (All(gap) + distance));
    Store(all.moments.share + j, share);
    Store(all.weight + j, total);
  }
}

inline void Copy(const Moments& from, const Moments& to, int64_t begin, int64_t end) {
  const int64_t bytes = (end - begin) * sizeof(float);
  __builtin_memcpy(to.error + begin, from.error + begin, bytes);
  __builtin_memcpy(to.distance + begin, from.distance + begin, bytes);
  __builtin_memcpy(to.share + begin, from.share + begin, bytes);
}

inline void StoreSums(const Growing& all, int64_t j, const Welford& sums, double offset) {
  all.moments.error[j] = static_cast<float>(sums.error);
  all.moments.distance[j] = static_cast<float>(sums.mean + offset);
  all.moments.share[j] = static_cast<float>(1 / (sums.weight > kEmpty ? sums.weight : kEmpty));
  all.weight[j] = static_cast<float>(sums.weight);
}

// The table of a row of 16 * blocks values; x and w as in IntervalTable. A row of one block has no cuts.
inline IntervalTable BuildTable(const float* x, const float* w, int64_t blocks, Scratch& scratch) {
  const int64_t size = blocks * kLanes;
  IntervalTable table{blocks, x, w, {}, nullptr, nullptr};
  // head: from a segment's first value to j. tail: from j to the first value after the segment.
  Growing head, tail;
  head.Take(scratch, size);
  tail.Take(scratch, size);
  float* to_block_end = scratch.Take<float>(size);
  for (int q = 0; int64_t{1} << q < blocks; ++q) table.cut[q].Take(scratch, size);
  table.from_start = head.moments.error;
  table.to_block_end = to_block_end;
  if (scratch.measures()) return table;

  for (int64_t start = 0; start < size; start += kLanes) {
    Welford forward, backward;
    const int64_t last = start + kLanes - 1;
    const double gap = double{x[last + 1]} - x[last];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      forward.Add(double{x[start + lane]} - x[start], w[start + lane]);
      backward.Add(double{x[last]} - x[last - lane], w[last - lane]);
      StoreSums(head, start + lane, forward, 0);
      StoreSums(tail, last - lane, backward, gap);
    }
  }
  __builtin_memcpy(to_block_end, tail.moments.error, size * sizeof(float));

  for (int q = 0; int64_t{1} << q < blocks; ++q) {
    const int64_t half = kLanes * (int64_t{1} << q);
    for (int64_t start = 0; start + half < size; start += 2 * half) {
      const int64_t middle = start + half, end = middle + half < size ? middle + half : size;
      Copy(tail.moments, table.cut[q], start, middle);
      Copy(head.moments, table.cut[q], middle, end);
      // A segment that the row's end cuts short is never the first half of a larger one, so it needs no tail.
      if (middle + half <= size) {
        Grow(tail, start, middle, tail.weight[middle], tail.moments.error[middle], tail.moments.distance[middle],
             head.moments.distance[end - 1], x[end] - x[middle]);
      }
      const Moments& cut = table.cut[q];
      Grow(head, middle, end, head.weight[middle - 1], head.moments.error[middle - 1],
           head.moments.distance[middle - 1], cut.distance[start], x[middle] - x[start]);
    }
  }
  return table;
}

}  // namespace
}  // namespace any4
