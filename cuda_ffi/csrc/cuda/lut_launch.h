// What LutProducts launches where LutWide isn't taken: LutTurns, or LutGeneral for weights that LutTurns doesn't take.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "lut_weight.h"

namespace any4 {

// A launch: up to kMostTogether weights that one instance of the kernel serves.
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
  // The number of blocks of `rows` rows that hold the weights' rows.
  int64_t Blocks(int64_t rows) const;
  // The kernel's argument for blocks of `rows` rows.
  LutBatch Batch(int64_t rows) const;
};

// The number of warps that split a block's inputs: a divisor of kShares, and no more than there are turns. The fewer
// the blocks, the more warps each needs to fill the multiprocessors; one has room for `resident` warps of the kernel.
int WarpsOfBlock(int64_t blocks, int64_t turns, int resident);

// LutTurns, by the type of x, and for bfloat16 by the width of the codes: 4 bits, and the other widths.
cudaError_t LaunchTurnsBfloat16(const LutLaunch& launch, cudaStream_t stream);
cudaError_t LaunchTurnsFloat16(const LutLaunch& launch, cudaStream_t stream);
cudaError_t LaunchTurnsWidths(const LutLaunch& launch, cudaStream_t stream);

}  // namespace any4
