// Scales a row and sorts it into its slot.
#pragma once

#include "kmeans_slot.cuh"

namespace any4 {
namespace {

constexpr int kInfinityBits = 0x7f800000;
// Entries that are sorted in shared memory at a time.
constexpr int kChunk = 4096;

struct Scaling {
  float unit;     // of the values; dividing by it is exact
  float weights;  // unit of the weights
  bool finite;
  bool weighted;  // false where there are no weights or they are ignored, as they are all zero or include NaN
};

// The largest power of two that is not above a magnitude; 1 for zero.
__device__ float PowerOfTwo(int bits) { return bits & kInfinityBits ? __int_as_float(bits & kInfinityBits) : 1.0f; }

__device__ int BlockMaximum(int value, int* shared) {
  value = __reduce_max_sync(kAll, value);
  __syncthreads();
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = value;
  __syncthreads();
  return __reduce_max_sync(kAll, shared[threadIdx.x % kWarps]);
}

__device__ Scaling ScalingOf(const float* values, const float* weights, int length, int* shared) {
  int largest = 0, heaviest = 0;
  for (int i = threadIdx.x; i < length; i += kThreads) {
    largest = max(largest, __float_as_int(values[i]) & 0x7fffffff);
    if (weights != nullptr) heaviest = max(heaviest, __float_as_int(weights[i]));
  }
  largest = BlockMaximum(largest, shared);
  heaviest = BlockMaximum(heaviest, shared);
  const bool weighted = heaviest > 0 && heaviest <= kInfinityBits;
  return {PowerOfTwo(largest), PowerOfTwo(heaviest),
          largest < kInfinityBits && !(weighted && heaviest == kInfinityBits), weighted};
}

// Keys, as unsigned numbers, have the order of their values; 0 and -0 have equal keys.
__device__ uint32_t KeyOf(float value) {
  const uint32_t bits = __float_as_uint(value + 0.0f);
  return bits ^ (bits >> 31 ? 0xffffffffu : 0x80000000u);
}

__device__ float ValueOf(uint64_t entry) {
  const uint32_t key = static_cast<uint32_t>(entry >> 32);
  return __uint_as_float(key ^ (key >> 31 ? 0x80000000u : 0xffffffffu));
}

// One stage of a bitonic sort (Batcher, 1968) of `count` entries, the first of which is number `base` of the whole.
__device__ void Exchange(uint64_t* entries, int count, int base, int span, int stride) {
  for (int pair = threadIdx.x; pair < count / 2; pair += kThreads) {
    const int i = 2 * pair - (pair & (stride - 1)), j = i + stride;
    const uint64_t a = entries[i], b = entries[j];
    if ((a > b) == (((base + i) & span) == 0)) {
      entries[i] = b;
      entries[j] = a;
    }
  }
  __syncthreads();
}

// Runs the stages that stay within chunks, of the sorts of segments of `first` to `last` entries.
__device__ void SortChunks(uint64_t* entries, int count, int first, int last, uint64_t* chunk) {
  const int size = min(count, kChunk);
  for (int base = 0; base < count; base += size) {
    for (int i = threadIdx.x; i < size; i += kThreads) chunk[i] = entries[base + i];
    __syncthreads();
    for (int span = first; span <= last; span *= 2) {
      for (int stride = min(span, size) / 2; stride > 0; stride /= 2) Exchange(chunk, size, base, span, stride);
    }
    for (int i = threadIdx.x; i < size; i += kThreads) entries[base + i] = chunk[i];
    __syncthreads();
  }
}

// Fills x and w of the slot. An entry is a value together with its weight, so that the order of equal values doesn't
// depend on their order in the row.
__device__ void SortRow(const float* values, const float* weights, const Scaling& scaling, const Slot& slot,
                        uint64_t* chunk) {
  int count = 2;
  while (count < slot.length) count *= 2;
  uint64_t* const entries = slot.entries;
  for (int i = threadIdx.x; i < count; i += kThreads) {
    uint64_t entry = ~uint64_t{0};
    if (i < slot.length) {
      float weight = scaling.weighted ? weights[i] / scaling.weights : 1.0f;
      if (weight <= kEmpty) weight = 0;
      entry = uint64_t{KeyOf(values[i] / scaling.unit)} << 32 | __float_as_uint(weight);
    }
    entries[i] = entry;
  }
  __syncthreads();
  SortChunks(entries, count, 2, min(count, kChunk), chunk);
  for (int span = 2 * kChunk; span <= count; span *= 2) {
    for (int stride = span / 2; stride >= kChunk; stride /= 2) Exchange(entries, count, 0, span, stride);
    SortChunks(entries, count, span, span, chunk);
  }
  for (int i = threadIdx.x; i <= slot.size; i += kThreads) {
    slot.x[i] = ValueOf(entries[min(i, slot.length - 1)]);
    if (i < slot.size) slot.w[i] = i < slot.length ? __uint_as_float(static_cast<uint32_t>(entries[i])) : 0.0f;
  }
  __syncthreads();
}

}  // namespace
}  // namespace any4
