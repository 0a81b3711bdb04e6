// Lloyd's iteration on a sorted row, where clusters are intervals.
#pragma once

#include "kmeans_start_inl.h"

namespace any4 {
namespace {

struct Sums {
  double weight = 0, moved = 0, squared = 0;
};

// The sums of w, w * (x - pivot) and, if kSquared, w * (x - pivot)^2 over the values [first, stop).
template <bool kSquared>
inline Sums SumsAbout(const SortedRow& row, int64_t first, int64_t stop, float pivot) {
  // Each lane adds up to 16 values in float32; doubles add the lanes.
  constexpr int64_t kChunk = 16 * kLanes;
  Sums sums;
  for (int64_t start = first / kLanes * kLanes; start < stop; start += kChunk) {
    Floats weight = All(0), moved = All(0), squared = All(0);
    const int64_t end = start + kChunk < stop ? start + kChunk : stop;
    for (int64_t i = start; i < end; i += kLanes) {
      Floats w = Load(row.w + i);
      if (i < first || i + kLanes > stop) {
        float part[kLanes];
        Store(part, w);
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          if (i + lane < first || i + lane >= stop) part[lane] = 0;
        }
        w = Load(part);
      }
      const Floats apart = Load(row.x + i) - All(pivot);
      weight = weight + w;
      moved = moved + w * apart;
      if (kSquared) squared = squared + w * apart * apart;
    }
    sums.weight += SumOf(weight);
    sums.moved += SumOf(moved);
    if (kSquared) sums.squared += SumOf(squared);
  }
  return sums;
}

// The number of values that are at most `limit`.
inline int64_t CountUpTo(const float* x, int64_t count, float limit) {
  int64_t low = 0;
  for (int64_t rest = count; rest > 0;) {
    const int64_t half = rest / 2;
    const bool right = x[low + half] <= limit;
    low = right ? low + half + 1 : low;
    rest = right ? rest - half - 1 : half;
  }
  return low;
}

// One past the last value whose nearest centroid is c or a lower one; ties go to the lower.
inline int64_t StopOf(const SortedRow& row, const float* centroids, int64_t k, int64_t c) {
  if (c + 1 == k) return row.count;
  return CountUpTo(row.x, row.count, centroids[c] + (centroids[c + 1] - centroids[c]) * 0.5f);
}

// The mean of each cluster, or its old centroid if it has no weight: [k]. Returns the first cluster without weight, or
// -1.
inline int64_t Means(const SortedRow& row, const float* old, int64_t k, float* means) {
  int64_t empty = -1;
  int64_t first = 0;
  for (int64_t c = 0; c < k; ++c) {
    const int64_t stop = StopOf(row, old, k, c);
    Sums sums;
    if (first < stop) sums = SumsAbout<false>(row, first, stop, row.x[first]);
    means[c] = sums.weight > 0 ? static_cast<float>(row.x[first] + sums.moved / sums.weight) : old[c];
    if (sums.weight <= 0 && empty < 0) empty = c;
    first = stop;
  }
  return empty;
}

// The value with the largest weighted squared error, or null if there is no error.
inline const float* Worst(const SortedRow& row, const float* centroids, int64_t k) {
  const float* worst = nullptr;
  float most = 0;
  for (int64_t i = 0; i < row.count; i += kLanes) {
    const Floats x = Load(row.x + i);
    Floats least = All(__builtin_inff());
    for (int64_t c = 0; c < k; ++c) least = Minimum(Absolute(x - All(centroids[c])), least);
    float errors[kLanes];
    Store(errors, Load(row.w + i) * least * least);
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      if (errors[lane] > most) {
        most = errors[lane];
        worst = row.x + i + lane;
      }
    }
  }
  return worst;
}

// Centroids in the row's units after Lloyd's steps. The steps end when the centroids' squared shift is at most tol
// times the row's weighted variance, and after max_iter of them. If a cluster then has no weight, it moves to the value
// with the largest weighted error, and the steps go on.
inline void LloydCentroids(SortedRow& row, const KMeansOptions& options, Scratch& scratch, float* centroids) {
  const int64_t k = options.clusters, length = row.count;
  row.count = (length + kLanes - 1) / kLanes * kLanes;
  float* const means = scratch.Take<float>(k);
  if (!scratch.measures()) {
    for (int64_t i = 0; i < length; ++i) row.w[i] = row.w[i] > 0 ? row.w[i] : 0;
    for (int64_t i = length; i < row.count; ++i) row.x[i] = row.x[length - 1];
    for (int64_t i = length; i < row.count; ++i) row.w[i] = 0;
  }
  Start(row, length, options, scratch, centroids);
  if (scratch.measures()) return;
  const Sums all = SumsAbout<false>(row, 0, length, row.x[0]);
  const float mean = static_cast<float>(row.x[0] + all.moved / all.weight);
  const double limit = options.tol * SumsAbout<true>(row, 0, length, mean).squared / all.weight;
  for (int64_t steps = 0; steps < options.max_iter;) {
    double moved;
    do {
      Means(row, centroids, k, means);
      moved = 0;
      for (int64_t c = 0; c < k; ++c) {
        moved += (double{means[c]} - centroids[c]) * (double{means[c]} - centroids[c]);
        centroids[c] = means[c];
      }
    } while (++steps < options.max_iter && moved > limit);
    const int64_t empty = Means(row, centroids, k, means);
    const float* const worst = empty < 0 || steps >= options.max_iter ? nullptr : Worst(row, centroids, k);
    if (worst == nullptr) break;
    centroids[empty] = *worst;
    SortAscending(centroids, k);
  }
  // Rounding may swap two neighbouring means that differ by one unit in the last place.
  SortAscending(centroids, k);
}

}  // namespace
}  // namespace any4
