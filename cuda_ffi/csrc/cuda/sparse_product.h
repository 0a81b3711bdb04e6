// y = x W^T for a W of few entries, in the layout of any4_jax's `Sparse`.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "lut_weight.h"

namespace any4 {

// Rows lie in blocks of `rows` each, of which each has room for `size` entries. Row r of the matrix has those of its
// block from the end of the row before, or 0, up to ends[r].
struct Entries {
  const void* ends;     // [n], uint16 or int32
  const void* columns;  // [blocks, size], uint16 or int32
  const void* values;   // [blocks, size], bfloat16 or float32
  int64_t n, k;
  int rows, size;
  bool wide_ends, wide_columns, float_values;
};

// x is [m, k] and y [m, n], of `type`: bfloat16, float16 or float32.
cudaError_t SparseProduct(const Entries& entries, const void* x, int64_t m, Type type, void* y, cudaStream_t stream);

}  // namespace any4
