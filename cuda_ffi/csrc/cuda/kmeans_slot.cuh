// The memory that a row is solved in.
//
// It lies in device memory, for any length of row: of what a layer of the dynamic program reads, some hundred kilobytes,
// the caches keep the most. Shared memory would hold rows of 4096 values on Hopper, and on no other.
#pragma once

#include <cstdint>

#include "kmeans.h"

namespace any4 {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
// Values whose intervals are cut at the same points: one a lane.
constexpr int kLanes = 32;
constexpr unsigned kAll = 0xffffffffu;
// Stands in for an empty weight in denominators; the heaviest weight lies in [1, 2).
constexpr float kEmpty = 1e-30f;

// Of the intervals from each position to one reference point: the squared error, the distance of the mean from that
// point, and 1 / weight, which is what joining two intervals takes.
struct Moments {
  float* error;
  float* distance;
  float* share;

  __device__ Moments operator+(int offset) const { return {error + offset, distance + offset, share + offset}; }
};

struct Growing : Moments {
  float* weight;
};

struct Slot {
  int length, blocks, size, layers;
  float* x;  // [size + 1], ascending, the last value repeated
  float* w;  // [size], 0 past the row's end
  // [levels, size]: at level q, from each position to the middle of its segment of 2^(q + 1) blocks, measured from
  // there.
  Moments cut;
  // From a segment's first value to each position, and from each position to the first value after the segment.
  Growing head, tail;
  uint64_t* entries;    // where `head` and `tail` will be: the row while it is sorted
  float* to_block_end;  // [size], errors of [j, end of j's block]
  // before[m * stride + i]: the least error of the first i values in at most m + 1 clusters.
  float* before;
  int stride;
  // [layers + 1, blocks]: starts of the last cluster of the values up to each block's end; those of layer 0 are 0.
  int* starts;

  // Lays everything out in memory aligned to 128 bytes, and returns how many bytes it takes.
  __host__ __device__ int64_t Place(char* memory, int row_length, int clusters) {
    length = row_length;
    blocks = (length + kLanes - 1) / kLanes;
    size = blocks * kLanes;
    layers = clusters - 1;
    int64_t bytes = 0;
    const auto take = [&](int64_t count) {
      char* const taken = memory + bytes;
      bytes += (count * 4 + 127) / 128 * 128;
      return reinterpret_cast<float*>(taken);
    };
    int levels = 0;
    while (1 << levels < blocks) ++levels;
    const int64_t cuts = int64_t{levels} * size;
    x = take(size + 1);
    w = take(size);
    cut = {take(cuts), take(cuts), take(cuts)};
    head = {{take(size), take(size), take(size)}, take(size)};
    tail = {{take(size), take(size), take(size)}, take(size)};
    // As many as the power of two at or above the length: at most half of head and tail.
    entries = reinterpret_cast<uint64_t*>(head.error);
    to_block_end = take(size);
    stride = size + kLanes;
    before = take(int64_t{stride} * layers);
    starts = reinterpret_cast<int*>(take(int64_t{layers + 1} * blocks));
    return bytes;
  }
};

}  // namespace any4
