// The functions that the handlers call.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "lut_weight.h"

namespace any4 {

// ys[i] [m, n of ws[i]] = x [m, k] ws[i]^T for `count` weights of one k. x and ys have `type`, kBfloat16 or kFloat16.
// group_size is 16, 32, 64, 128, 256, ... or at least k. No bit of a result depends on what else is computed with it.
// The function neither allocates nor waits.
cudaError_t LutProducts(const LutWeight* ws, void* const* ys, int count, int bits, int64_t group_size, const void* x,
                        int64_t m, Type type, cudaStream_t stream);

// out [n, k] = W in `type`, computed in float32 and rounded once.
cudaError_t LutDequantize(const LutWeight& w, int bits, int64_t group_size, void* out, Type type, cudaStream_t stream);

}  // namespace any4
