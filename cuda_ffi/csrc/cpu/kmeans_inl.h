// A row from its values to its clusters; each instruction set's file includes this one.
#pragma once

#include "kmeans.h"
#include "kmeans_exact_inl.h"
#include "kmeans_lloyd_inl.h"
#include "kmeans_row_inl.h"

namespace any4 {
namespace {

// Merges equal values, adding their weights, and drops values without weight: an optimum for the rest is one for the
// row. Pads the row to whole blocks.
inline void MergeEqual(SortedRow& row) {
  int64_t count = 0;
  for (int64_t i = 0; i < row.count;) {
    const float value = row.x[i];
    double weight = 0;
    for (; i < row.count && row.x[i] == value; ++i) {
      if (row.w[i] > kEmpty) weight += row.w[i];
    }
    if (weight > 0) {
      row.x[count] = value;
      row.w[count++] = static_cast<float>(weight);
    }
  }
  row.count = count;
  for (int64_t i = count; i < (count + kLanes - 1) / kLanes * kLanes; ++i) row.w[i] = 0;
  for (int64_t i = count; i <= (count + kLanes - 1) / kLanes * kLanes; ++i) row.x[i] = row.x[count - 1];
}

// The mean of the values [first, stop) of a row.
inline float MeanOf(const SortedRow& row, int64_t first, int64_t stop) {
  double weight = 0, moved = 0;
  for (int64_t i = first; i < stop; ++i) {
    weight += row.w[i];
    moved += row.w[i] * (double{row.x[i]} - row.x[first]);
  }
  return static_cast<float>(row.x[first] + moved / weight);
}

// The error of a clustering that is good if the values' density is smooth: in an optimal one the centroids are as dense
// as the cube root of the values' density (Panter and Dite, 1951). Lloyd's steps improve it.
inline float UpperBound(const SortedRow& row, int64_t k, Scratch& scratch) {
  constexpr int kSteps = 2;
  const int64_t blocks = (row.count + kLanes - 1) / kLanes;
  float* const density = scratch.Take<float>(blocks + 1);
  float* centroids = scratch.Take<float>(k);
  float* means = scratch.Take<float>(k);
  if (scratch.measures()) return 0;
  density[0] = 0;
  for (int64_t b = 0; b < blocks; ++b) {
    const float width = row.x[(b + 1) * kLanes < row.count ? (b + 1) * kLanes : row.count - 1] - row.x[b * kLanes];
    const float weight = static_cast<float>(SumOf(Load(row.w + b * kLanes)));
    density[b + 1] = density[b] + __builtin_cbrtf(weight * width * width);
  }
  int64_t b = 0;
  for (int64_t c = 0; c < k; ++c) {
    const float wanted = (c + 0.5f) / k * density[blocks];
    while (b + 1 < blocks && density[b + 1] <= wanted) ++b;
    const int64_t middle = b * kLanes + kLanes / 2;
    centroids[c] = row.x[middle < row.count ? middle : row.count - 1];
  }
  for (int step = 0; step < kSteps; ++step) {
    Means(row, centroids, k, means);
    float* const swapped = centroids;
    centroids = means;
    means = swapped;
  }
  double error = 0;
  int64_t first = 0;
  for (int64_t c = 0; c < k; ++c) {
    const int64_t stop = StopOf(row, centroids, k, c);
    if (first < stop) error += SumsAbout<true>(row, first, stop, centroids[c]).squared;
    first = stop > first ? stop : first;
  }
  // The margin is far larger than the solver's rounding.
  return static_cast<float>(error * 1.001);
}

// Centroids in the row's units; if fewer than k clusters suffice, the first one is repeated.
inline void ExactCentroids(SortedRow& row, int64_t k, Scratch& scratch, float* centroids) {
  int32_t* const firsts = scratch.Take<int32_t>(k);
  if (!scratch.measures()) MergeEqual(row);
  const int64_t blocks = (row.count + kLanes - 1) / kLanes;
  const float bound = UpperBound(row, k, scratch);
  const IntervalTable table = BuildTable(row.x, row.w, blocks, scratch);
  const int64_t count = ExactClusters(table, row.count, k, bound, firsts, scratch);
  if (scratch.measures()) return;
  for (int64_t c = 0; c < count; ++c) {
    const int64_t stop = c + 1 < count ? firsts[c + 1] : row.count;
    centroids[k - count + c] = MeanOf(row, firsts[c], stop);
  }
  for (int64_t c = 0; c < k - count; ++c) centroids[c] = centroids[k - count];
}

inline int64_t ScratchBytes(int64_t length, const KMeansOptions& options) {
  Scratch scratch(nullptr);
  SortedRow row = SortRow({nullptr, nullptr, length}, scratch);
  if (options.start == KMeansStart::kNone) {
    ExactCentroids(row, options.clusters, scratch, nullptr);
  } else {
    LloydCentroids(row, options, scratch, nullptr);
  }
  return scratch.used();
}

inline void Solve(const KMeansRow& row, const KMeansOptions& options, char* memory, const KMeansResult& result) {
  Scratch scratch(memory);
  SortedRow sorted = SortRow(row, scratch);
  const int64_t k = options.clusters;
  if (!sorted.finite) {
    for (int64_t c = 0; c < k; ++c) result.centroids[c] = __builtin_nanf("");
    for (int64_t i = 0; i < row.length; ++i) result.codes[i] = 0;
    *result.inertia = __builtin_nanf("");
    return;
  }
  if (options.start == KMeansStart::kNone) {
    ExactCentroids(sorted, k, scratch, result.centroids);
  } else {
    LloydCentroids(sorted, options, scratch, result.centroids);
  }
  for (int64_t c = 0; c < k; ++c) result.centroids[c] *= sorted.unit;
  Assign(row, sorted.weighted, k, result);
}

constexpr KMeansKernel kKernel{ScratchBytes, Solve};

}  // namespace
}  // namespace any4
