// The optimal clusters of a sorted row, by dynamic programming over the number of clusters.
//
// before[i] is the least error of the first i values in m - 1 clusters; in m clusters, that of the values up to j is
// the minimum over i <= j of before[i] plus the error of [i, j]. That error satisfies the quadrangle inequality, so the
// best i never decreases with j (Wu, "Optimal quantization by matrix searching", 1991; Gronlund et al., "Fast exact
// k-means, k-medians and Bregman divergence clustering in 1D", 2017), nor with m. For the last value of every block of
// 16, divide and conquer finds the best i, 16 candidates at a time. For the other values of a block the best i lies
// between those of its neighbours, and the solver tries all of these, for 16 values at a time. If rounding swaps
// near-equal candidates, no more than the rounding is lost.
//
// A layer ends at the block where its error exceeds `bound`, the error of some clustering of the whole row: no optimum
// gets there with so few clusters. That saves a third of the work.
#pragma once

#include "kmeans_table_inl.h"

namespace any4 {
namespace {

// Calls body(q, begin, end) for each run of blocks [begin, end) within [low, high) that level q cuts from block b.
template <class Body>
inline __attribute__((always_inline)) void ForRuns(int64_t b, int64_t low, int64_t high, const Body& body) {
  const int64_t stop = high < b ? high : b;
  while (low < stop) {
    const int q = 63 - __builtin_clzll(low ^ b);
    const int64_t half = ((low >> q) + 1) << q, end = half < stop ? half : stop;
    body(q, low, end);
    low = end;
  }
}

struct BestStart {
  int32_t index;
  float total;
};

// The i in [low, high] with the least before[i] + error of [i, j]; of equals the smallest. within: the errors of [i, j]
// for the i of j's block.
inline BestStart FindStart(const IntervalTable& table, const float* before, int64_t j, const float* within, int64_t low,
                           int64_t high) {
  Floats least = All(__builtin_inff());
  Ints least_block = AllInts(0);
  const auto offer = [&](const Floats& total, int64_t block) {
    const Ints better = total < least;
    least = Where(better, total, least);
    least_block = Where(better, AllInts(static_cast<int32_t>(block)), least_block);
  };
  const int64_t b = j / kLanes;
  ForRuns(b, low / kLanes, high / kLanes + 1, [&](int q, int64_t begin, int64_t end) {
    const Moments& cut = table.cut[q];
    const Floats error = All(cut.error[j]), distance = All(cut.distance[j]), share = All(cut.share[j]);
    for (int64_t a = begin; a < end; ++a) {
      const Floats apart = Load(cut.distance + a * kLanes) + distance;
      const Floats joined = Divide(apart * apart, Load(cut.share + a * kLanes) + share);
      offer(Load(before + a * kLanes) + Load(cut.error + a * kLanes) + joined + error, a);
    }
  });
  if (high >= b * kLanes) offer(Load(before + b * kLanes) + Load(within), b);
  // The bits of floats that are not negative have the floats' order, and compilers reduce minima of integers in
  // registers.
  int32_t totals[kLanes], indices[kLanes];
  Store(totals, least);
  Store(indices, least_block);
  int32_t best = totals[0];
  for (int lane = 1; lane < kLanes; ++lane) best = totals[lane] < best ? totals[lane] : best;
  int32_t index = static_cast<int32_t>(high);
  for (int lane = 0; lane < kLanes; ++lane) {
    const int32_t i = totals[lane] == best ? indices[lane] * kLanes + lane : index;
    index = i < index ? i : index;
  }
  return {index < low ? static_cast<int32_t>(low) : index, FloatOf(best)};
}

// The best starts of the intervals that end with each block: [blocks]. earlier: those of the layer before; of its
// errors, `before`, the first `known` are there. Returns the number of blocks up to and including the first that
// exceeds the bound; the starts of blocks beyond it are lower bounds.
inline int64_t BlockStarts(const IntervalTable& table, const float* before, int64_t known, float bound,
                           const int32_t* earlier, int32_t* starts) {
  int64_t reach = table.blocks;
  int64_t stride = 1;
  while (stride * 2 <= table.blocks) stride *= 2;
  for (; stride > 0; stride /= 2) {
    for (int64_t b = stride - 1; b < reach; b += 2 * stride) {
      const int64_t j = b * kLanes + kLanes - 1;
      int64_t high = b + stride < reach ? starts[b + stride] : j;
      high = high < known ? high : known - 1;
      int64_t low = b >= stride ? starts[b - stride] : 0;
      low = earlier[b] > low ? earlier[b] : low;
      const BestStart best =
          FindStart(table, before, j, table.to_block_end + b * kLanes, low < high ? low : high, high);
      starts[b] = best.index;
      if (best.total > bound) reach = b + 1;
    }
  }
  for (int64_t b = reach; b < table.blocks; ++b) starts[b] = starts[reach - 1];
  return reach;
}

// The layer that follows `before`, for the first `reach` blocks: after[j + 1] for every j.
inline void FillLayer(const IntervalTable& table, const float* before, const int32_t* starts, int64_t reach,
                      float* after) {
  after[0] = 0;
  for (int64_t b = 0; b < reach; ++b) {
    const int64_t low = b > 0 ? starts[b - 1] : 0, high = starts[b] + 1, own = b * kLanes;
    Floats least = All(__builtin_inff());
    ForRuns(b, low / kLanes, (high - 1) / kLanes + 1, [&](int q, int64_t begin, int64_t end) {
      const Moments& cut = table.cut[q];
      const Floats distance = Load(cut.distance + own), share = Load(cut.share + own);
      Floats run_least = All(__builtin_inff());
      const int64_t first = begin * kLanes > low ? begin * kLanes : low;
      const int64_t stop = end * kLanes < high ? end * kLanes : high;
      for (int64_t i = first; i < stop; ++i) {
        const Floats apart = All(cut.distance[i]) + distance;
        const Floats joined = Divide(apart * apart, All(cut.share[i]) + share);
        run_least = Minimum(All(before[i] + cut.error[i]) + joined, run_least);
      }
      least = Minimum(least, run_least + Load(cut.error + own));
    });
    for (int64_t i = own > low ? own : low; i < high; ++i) {
      least = Minimum(least, All(before[i]) + table.FromWithinBlock(i));
    }
    Store(after + own + 1, least);
  }
  // Fills up the block of the last value, since candidates are loaded by blocks.
  Store(after + reach * kLanes + 1, All(__builtin_inff()));
}

// The number of clusters, 1 to k, of the first `length` values of the table's row, and the index of each cluster's
// first value, ascending. bound: no less than the least error of k clusters.
inline int64_t ExactClusters(const IntervalTable& table, int64_t length, int64_t k, float bound, int32_t* firsts,
                             Scratch& scratch) {
  const int64_t size = table.blocks * kLanes;
  const int64_t layers = k - 1;
  // Layer m + 2 starts from before + m * stride, of which known[m] values are known; its best starts are at
  // starts + (m + 1) * blocks.
  const int64_t stride = size + 2 * kLanes;
  float* before = scratch.Take<float>(layers * stride);
  int64_t* known = scratch.Take<int64_t>(layers);
  int32_t* starts = scratch.Take<int32_t>((layers + 1) * table.blocks);
  if (scratch.measures()) return 0;
  for (int64_t b = 0; b < table.blocks; ++b) starts[b] = 0;
  if (layers > 0) {
    before[0] = 0;
    __builtin_memcpy(before + 1, table.from_start, size * sizeof(float));
    Store(before + size + 1, All(__builtin_inff()));
    known[0] = size;
  }
  for (int64_t m = 0; m + 1 < layers; ++m) {
    int32_t* const now = starts + (m + 1) * table.blocks;
    float* const after = before + (m + 1) * stride;
    const int64_t reach = BlockStarts(table, before + m * stride, known[m], bound, now - table.blocks, now);
    FillLayer(table, before + m * stride, now, reach, after);
    known[m + 1] = reach * kLanes + 1;
  }
  int64_t count = 0;
  int64_t last = length - 1;
  for (int64_t m = layers - 1; m >= 0 && last >= 0; --m) {
    const int64_t b = last / kLanes;
    float within[kLanes];
    table.ToWithinBlock(last, within);
    const int32_t* const now = starts + (m + 1) * table.blocks;
    const bool solved = m + 1 < layers;
    const int64_t low = !solved ? now[b - table.blocks] : b > 0 ? now[b - 1] : 0;
    int64_t high = solved && now[b] < last ? now[b] : last;
    high = high < known[m] ? high : known[m] - 1;
    firsts[count] = FindStart(table, before + m * stride, last, within, low < high ? low : high, high).index;
    last = int64_t{firsts[count++]} - 1;
  }
  if (last >= 0) firsts[count++] = 0;
  for (int64_t c = 0; c < count / 2; ++c) {
    const int32_t swapped = firsts[c];
    firsts[c] = firsts[count - 1 - c];
    firsts[count - 1 - c] = swapped;
  }
  return count;
}

}  // namespace
}  // namespace any4
