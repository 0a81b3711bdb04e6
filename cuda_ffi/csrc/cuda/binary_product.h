// y = x W^T for a W that is a sum of binary planes. Each two rows of x read it anew.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "lut_weight.h"

namespace any4 {

constexpr int kBinaryTile = 128;    // inputs that a warp takes at a time; a group has a power of two times as many
constexpr int kMostPlanes = 4;
constexpr int64_t kBinaryMostInputs = 32768;  // of a row

// W[n, k] += lut[n or 0, code] * scales[n, group] + offsets[n, group], all but the codes in bfloat16.
struct BinaryPlane {
  const void* codes;    // [n, k / 8 bytes], the first code of a byte in its lowest bit
  const void* lut;      // [n or 1, 2]
  const void* scales;   // [n, groups]
  const void* offsets;  // [n, groups], or nullptr
  bool own_tables;      // whether each row has a table
};

struct BinaryWeight {
  BinaryPlane planes[kMostPlanes];
  int count;
  int64_t n, k;  // k is a multiple of kBinaryTile, at most kBinaryMostInputs; n * k / 8 below 2^32
  int64_t groups;
  int group_shift;  // a group has kBinaryTile << group_shift inputs
};

// x is [m, k] and y [m, n], both of `type`, bfloat16 or float16.
cudaError_t BinaryProduct(const BinaryWeight& weight, const void* x, int64_t m, Type type, void* y, cudaStream_t stream);

}  // namespace any4
