// Scales and sorts a row on the way in; finds its codes and inertia on the way out.
#pragma once

#include "kmeans.h"
#include "lanes_inl.h"
#include "scratch.h"

namespace any4 {
namespace {

constexpr int32_t kInfinityBits = 0x7f800000;

// The bits of the largest magnitude; they are above kInfinityBits if there is a NaN.
inline int32_t LargestBits(const float* values, int64_t count, uint32_t sign_mask) {
  int32_t largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t bits = static_cast<int32_t>(BitsOf(values[i]) & sign_mask);
    largest = bits > largest ? bits : largest;
  }
  return largest;
}

// The largest power of two not above a magnitude, or 1 for zero: dividing by it is exact.
inline float PowerOfTwo(int32_t bits) { return bits & kInfinityBits ? FloatOf(bits & kInfinityBits) : 1.0f; }

// A sorted row divided by `unit`, with weights whose heaviest lies in [1, 2).
struct SortedRow {
  float* x;
  float* w;
  int64_t count;
  float unit;
  bool finite;
  bool weighted;  // false if weights are absent or to be ignored: all are zero, or one is NaN
};

// Sorts entries by their bits from kShift on, a byte at a time; the result is in `entries`.
template <class Entry, int kShift>
inline void SortByBytes(Entry* entries, Entry* spare, int64_t count) {
  int32_t starts[4][256] = {};
  for (int64_t i = 0; i < count; ++i) {
    const uint32_t key = static_cast<uint32_t>(entries[i] >> kShift);
    for (int byte = 0; byte < 4; ++byte) ++starts[byte][key >> (8 * byte) & 255];
  }
  Entry *from = entries, *to = spare;
  for (int byte = 0; byte < 4; ++byte) {
    int32_t* const start = starts[byte];
    const int shift = kShift + 8 * byte;
    int32_t sum = 0;
    for (int value = 0; value < 256; ++value) {
      const int32_t here = start[value];
      start[value] = sum;
      sum += here;
    }
    for (int64_t i = 0; i < count; ++i) to[start[from[i] >> shift & 255]++] = from[i];
    Entry* const swapped = from;
    from = to;
    to = swapped;
  }
}

// Keys, as unsigned numbers, have the order of the values; 0 and -0 become equal.
inline uint32_t KeyOf(float value) {
  const uint32_t bits = BitsOf(value + 0.0f);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

inline float ValueOf(uint32_t key) { return FloatOf(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu)); }

inline SortedRow SortRow(const KMeansRow& row, Scratch& scratch) {
  const int64_t n = row.length;
  SortedRow sorted{scratch.Take<float>(n + kLanes + 1), scratch.Take<float>(n + kLanes + 1), n, 1, true, false};
  uint64_t* const entries = scratch.Take<uint64_t>(n);
  uint64_t* const spare = scratch.Take<uint64_t>(n);
  if (scratch.measures()) return sorted;
  const int32_t largest = LargestBits(row.values, n, 0x7fffffff);
  const int32_t heaviest = row.weights == nullptr ? 0 : LargestBits(row.weights, n, 0xffffffff);
  sorted.unit = PowerOfTwo(largest);
  sorted.weighted = heaviest > 0 && heaviest <= kInfinityBits;
  sorted.finite = largest < kInfinityBits && !(sorted.weighted && heaviest == kInfinityBits);
  if (!sorted.finite) return sorted;
  if (sorted.weighted) {
    const float weight_unit = PowerOfTwo(heaviest);
    for (int64_t i = 0; i < n; ++i) {
      entries[i] = uint64_t{KeyOf(row.values[i] / sorted.unit)} << 32 | BitsOf(row.weights[i] / weight_unit);
    }
    SortByBytes<uint64_t, 32>(entries, spare, n);
    for (int64_t i = 0; i < n; ++i) {
      sorted.x[i] = ValueOf(static_cast<uint32_t>(entries[i] >> 32));
      sorted.w[i] = FloatOf(static_cast<uint32_t>(entries[i]));
    }
  } else {
    uint32_t* const keys = reinterpret_cast<uint32_t*>(entries);
    for (int64_t i = 0; i < n; ++i) keys[i] = KeyOf(row.values[i] / sorted.unit);
    SortByBytes<uint32_t, 0>(keys, reinterpret_cast<uint32_t*>(spare), n);
    for (int64_t i = 0; i < n; ++i) {
      sorted.x[i] = ValueOf(keys[i]);
      sorted.w[i] = 1;
    }
  }
  return sorted;
}

// The nearest of k centroids to each value, ties to the lower, and the sum of weight * distance^2.
inline void Assign(const KMeansRow& row, bool weighted, int64_t k, const KMeansResult& result) {
  double inertia = 0;
  for (int64_t start = 0; start < row.length; start += kLanes) {
    const int64_t rest = row.length - start;
    const int count = rest < kLanes ? static_cast<int>(rest) : kLanes;
    float values[kLanes] = {};
    __builtin_memcpy(values, row.values + start, count * sizeof(float));
    const Floats x = Load(values);
    Floats least = All(__builtin_inff());
    Ints nearest = AllInts(0);
    for (int64_t c = 0; c < k; ++c) {
      const Floats distance = Absolute(x - All(result.centroids[c]));
      const Ints nearer = distance < least;
      least = Where(nearer, distance, least);
      nearest = Where(nearer, AllInts(static_cast<int32_t>(c)), nearest);
    }
    float distances[kLanes];
    int32_t codes[kLanes];
    Store(distances, least);
    Store(codes, nearest);
    for (int lane = 0; lane < count; ++lane) {
      result.codes[start + lane] = static_cast<uint8_t>(codes[lane]);
      const double weight = weighted ? row.weights[start + lane] : 1.0f;
      inertia += weight * (double{distances[lane]} * distances[lane]);
    }
  }
  *result.inertia = static_cast<float>(inertia);
}

}  // namespace
}  // namespace any4
