// y = x W^T for a W that is a sum of binary planes, with few rows of x.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "lut_weight.h"

namespace any4 {

constexpr int kBinaryTile = 128;    // inputs that a warp takes at a time; a group has a multiple of them
constexpr int kBinaryColumns = 8;   // the most rows of x
constexpr int kMostPlanes = 8;

// W[n, k] += lut[n or 0, code] * scales[n, group] + offsets[n, group], all but the codes in bfloat16.
struct BinaryPlane {
  const uint32_t* codes;  // [n, k / 32], the first code of a word in its lowest bit
  const void* lut;        // [n or 1, 2]
  const void* scales;     // [n, groups]
  const void* offsets;    // [n, groups], or nullptr
  int lut_stride;         // 2, or 0 where all rows share one table
};

struct BinaryWeight {
  BinaryPlane planes[kMostPlanes];
  int count;
  int64_t n, k;  // k is a multiple of kBinaryTile
  int64_t groups, group_tiles;
};

// `x` is arranged as cuda_ffi/binary_product_cuda.py has it; y is [m, n]. Both are of `type`, bfloat16 or float16.
cudaError_t BinaryProduct(const BinaryWeight& weight, const void* x, int64_t m, Type type, void* y, cudaStream_t stream);

}  // namespace any4
