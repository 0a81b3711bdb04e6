// What the handlers launch.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "lut_weight.h"

namespace any4 {

// y [m, n] = x [m, k] W^T, both of `type`, kBfloat16 or kFloat16. group_size is 16, 32, 64, 128, 256, ... or at least
// k. Neither allocates nor waits.
cudaError_t LutProduct(const LutWeight& w, int bits, int64_t group_size, const void* x, void* y, int64_t m, Type type,
                       cudaStream_t stream);

// out [n, k] = W of `type`, computed in float32 and rounded once.
cudaError_t LutDequantize(const LutWeight& w, int bits, int64_t group_size, void* out, Type type, cudaStream_t stream);

}  // namespace any4
