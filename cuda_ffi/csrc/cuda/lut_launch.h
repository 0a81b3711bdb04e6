// The two kinds of kernel behind LutProduct.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "lut_weight.h"

namespace any4 {

int Multiprocessors();

// Warps that share a block's inputs, of which there are `turns`. A multiprocessor has room for `resident` warps of the
// kernel, and few blocks need more warps each to fill it; but 8 at most, since each is a sum more to add up.
int WarpsOfBlock(int64_t blocks, int64_t turns, int resident);

bool IsForTurns(const LutWeight& w, int bits, int64_t group_size, int64_t m);
cudaError_t LaunchTurns(const LutWeight& w, int64_t group_size, const void* x, void* y, int64_t m, Type type,
                        cudaStream_t stream);

}  // namespace any4
