// The products of tables of int8 with x rounded to integers, as the handlers call them.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "lut_weight.h"

namespace any4 {

// How x is rounded: to a byte, by the largest magnitude of 32 inputs, or to two bytes, by that of 64.
enum class Inputs : int { kBytes = 1, kPairs = 2 };

// Whether ByteProducts takes a weight of 4-bit codes.
bool IsForBytes(const LutWeight& w, int64_t group_size);

// ys[i] [m, n of ws[i]] = x [m, k] ws[i]^T in bfloat16 for `count` weights of one k that are IsForBytes. No bit of a
// result depends on what else is computed with it. The function neither allocates nor waits.
cudaError_t ByteProducts(const LutWeight* ws, void* const* ys, int count, int64_t group_size, const void* x, int64_t m,
                         Inputs inputs, cudaStream_t stream);

}  // namespace any4
