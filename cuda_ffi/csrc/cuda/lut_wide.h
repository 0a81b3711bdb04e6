// The launch of LutWide, the product for many rows of x on Hopper.
#pragma once

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <cstdint>

#include "lut_weight.h"

namespace any4 {

// y [m, n] = x [m, k] w^T.
struct WideLaunch {
  LutWeight w;
  void* y;
  int64_t group_size;
  const void* x;
  int64_t m;
  Type type;
};

// Whether this device, these addresses and these sizes allow what IsForWide (lut_form.h) says of the weight.
bool CanLaunchWide(const WideLaunch& launch);

cudaError_t LaunchWide(const WideLaunch& launch, cudaStream_t stream);

// LaunchWide by the type of x.
cudaError_t LaunchWideBfloat16(const WideLaunch& launch, cudaStream_t stream);
cudaError_t LaunchWideFloat16(const WideLaunch& launch, cudaStream_t stream);

// Describes a row-major matrix [rows, columns] for the copy engine, which copies boxes of it. Returns false where the
// driver can't.
bool Encode(CUtensorMap* map, CUtensorMapDataType type, const void* matrix, int64_t rows, int64_t columns, int box_rows,
            int box_columns, CUtensorMapSwizzle swizzle);

}  // namespace any4
