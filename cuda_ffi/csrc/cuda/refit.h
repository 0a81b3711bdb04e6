// The refit of table-coded rows, to their stored dtypes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "slots.h"

namespace any4 {

constexpr int kMostStarts = 64;

struct RefitRows {
  const float* w;           // [count, length]
  const float* importance;  // [length]
  const float* lut;         // [count, levels], ascending
  const float* scales;      // [count, groups]
  const float* offsets;     // like scales; null: none
  int64_t count;
  int length, group_size, groups;
  int levels;  // 4, 8 or 16
};

struct RefitOptions {
  int searches, max_rounds;  // rounds that begin with a search, and the most rounds there are
  int first, stop;           // the table's entries that may change
  float settled;             // a row whose error falls by less than this share is finished
  // The starts of a search: each multiplies the scale by a factor and holds a point of the table's range, where 0 is
  // its lower end and 1 its upper. `fits` least-squares fits follow each.
  int starts, fits;
  float factors[kMostStarts], held[kMostStarts];
  int lut_mantissa, scale_mantissa, offset_mantissa;  // bits: 23 float32, 10 float16, 7 bfloat16; 0 for a lut of int8
};

struct RefitResult {
  float* lut;
  float* scales;
  float* offsets;
};

Slots RefitSlots(const RefitRows& rows);

// `scratch` holds all slots. The function neither allocates nor waits.
cudaError_t Refit(const RefitRows& rows, const RefitOptions& options, const RefitResult& result, const Slots& slots,
                  void* scratch, cudaStream_t stream);

}  // namespace any4
