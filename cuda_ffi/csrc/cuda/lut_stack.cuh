// Which matrix of a launch a block works on, and where in its stack that matrix lies.
#pragma once

#include <cstdint>

#include "lut_weight.h"

namespace any4 {

__host__ __device__ __forceinline__ int64_t BytesOf(Type type) {
  return type == Type::kE8m0 || type == Type::kInt8 ? 1 : type == Type::kFloat32 ? 4 : 2;
}

// The number of the matrix in the stack. The kernel reads it from the device, so that a loop over layers multiplies
// each matrix where it lies.
__device__ __forceinline__ int64_t IndexOf(const LutWeight& w) {
  if (w.index == nullptr) return 0;
  return min(max(static_cast<int64_t>(__ldg(w.index)), int64_t{0}), w.stack - 1);
}

// The weight with its pointers moved to that matrix.
template <int kBits>
__device__ __forceinline__ LutWeight TakeOfStack(LutWeight w) {
  if (w.index == nullptr) return w;
  const int64_t i = IndexOf(w);
  const int64_t weights = w.n * w.k, groups = w.n * w.groups;
  const auto advance = [i](const void* from, int64_t bytes) { return static_cast<const uint8_t*>(from) + i * bytes; };
  w.codes = advance(w.codes, weights * (kBits == 3 ? 2 : kBits) / 8);
  if (kBits == 3) w.high = advance(w.high, weights / 8);
  w.lut = advance(w.lut, (w.lut_stride == 0 ? 1 : w.n) * BytesOf(w.lut_type) << kBits);
  w.scales = advance(w.scales, groups * BytesOf(w.scale_type));
  if (w.offsets != nullptr) w.offsets = advance(w.offsets, groups * BytesOf(w.offset_type));
  return w;
}

// A block's part of the batch: its weight, where the result goes, and the block's number among the weight's blocks.
struct Part {
  LutWeight w;
  void* y;
  unsigned block;
};

template <int kBits>
__device__ __forceinline__ Part PartOf(const LutBatch& batch) {
  int i = 0;
  while (blockIdx.x >= batch.ends[i]) ++i;
  return {TakeOfStack<kBits>(batch.weights[i]), batch.results[i], blockIdx.x - (i == 0 ? 0 : batch.ends[i - 1])};
}

}  // namespace any4
