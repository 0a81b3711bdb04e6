// The two kinds of kernel behind LutProducts.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "lut_weight.h"

namespace any4 {

// A launch: up to kMostTogether weights that are alike in what an instance of the kernel is made for.
struct LutLaunch {
  const LutWeight* ws;
  void* const* ys;
  int count;
  int bits;
  int64_t group_size;
  const void* x;
  int64_t m;
  Type type;

  int64_t k() const { return ws[0].k; }
  // Blocks of `rows` rows that the weights' rows fill.
  int64_t Blocks(int64_t rows) const;
  // The kernel's argument for blocks of so many rows.
  LutBatch Batch(int64_t rows) const;
};

// Warps that share a block's inputs: few blocks need more warps each to fill the multiprocessors, of which each has
// room for `resident` warps of the kernel. A divisor of kShares, and no more than there are turns.
int WarpsOfBlock(int64_t blocks, int64_t turns, int resident);

// LutTurns, by the type of x, and of bfloat16 by the width of codes.
cudaError_t LaunchTurnsBfloat16(const LutLaunch& launch, cudaStream_t stream);
cudaError_t LaunchTurnsFloat16(const LutLaunch& launch, cudaStream_t stream);
cudaError_t LaunchTurnsWidths(const LutLaunch& launch, cudaStream_t stream);

}  // namespace any4
