// The launch of the kernel for many rows of x.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "lut_weight.h"

namespace any4 {

cudaError_t LaunchWide(int choice, const LutWeight& w, void* y, int64_t group_size, const void* x, int64_t m, Type type, cudaStream_t stream);

}  // namespace any4
