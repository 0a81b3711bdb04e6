// The memory in which a row is solved.
//
// It is device memory, for rows of any length: a layer of the dynamic program reads some hundred kilobytes, most of
// which stay in the caches. Shared memory would hold rows of 4096 values on Hopper, and on no other GPU.
#pragma once

#include <cstdint>

#include "kmeans.h"

namespace any4 {

constexpr int kThreads = 1024, kWarps = kThreads / 32;
// The values of a block, whose intervals are cut at the same points: one per lane.
constexpr int kLanes = 32;
constexpr unsigned kAll = 0xffffffffu;
// Stands in for an empty weight in denominators; the heaviest weight lies in [1, 2).
constexpr float kEmpty = 1e-30f;

// For the interval from each position to a reference point: its squared error, the distance of its mean from that
// point, and 1 / weight, which are what joining two intervals takes.
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
  // [levels, size]: at level q, the intervals from each position to the middle of its segment of 2^(q + 1) blocks, with
  // distances from there.
  Moments cut;
  // The intervals from a segment's first value to each position, and from each position to the first value after the
  // segment.
  Growing head, tail;
  uint64_t* entries;    // the row while it is sorted, where `head` and `tail` will be
  float* to_block_end;  // [size], errors of [j, end of j's block]
  // before[m * stride + i]: the least error of the first i values in at most m + 1 clusters.
  float* before;
  int stride;
  // [layers + 1, blocks]: the start of the last cluster of the values up to each block's end; in layer 0 it is 0.
  int* starts;

  // Lays everything out in `memory`, which is aligned to 128 bytes, and returns how many bytes it takes.
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
    // There are as many entries as the power of two at or above the length: they take at most half of head and tail.
    entries = reinterpret_cast<uint64_t*>(head.error);
    to_block_end = take(size);
    stride = size + kLanes;
    before = take(int64_t{stride} * layers);
    starts = reinterpret_cast<int*>(take(int64_t{layers + 1} * blocks));
    return bytes;
  }
};

}  // namespace any4
