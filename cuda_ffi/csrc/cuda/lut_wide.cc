// Which products LutWide takes, and how its matrices are described to the copy engine.
#include "lut_wide.h"

#include <cudaTypedefs.h>

#include <climits>

#include "device.h"

namespace any4 {
namespace {

// Finds the driver's function. The driver's library isn't linked, since a machine without a GPU has none.
PFN_cuTensorMapEncodeTiled_v12000 FindEncoder() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
  const bool there = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
  return there ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found) : nullptr;
}

// Whether an address has the alignment that the copy engine needs.
bool IsAligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

}  // namespace

bool CanLaunchWide(const WideLaunch& launch) {
  const LutWeight& w = launch.w;
  if (w.stack * w.n > INT_MAX || w.n * w.groups > INT_MAX || launch.m > INT_MAX / 2 || w.k > INT_MAX / 2) return false;
  return IsAligned(launch.x) && IsAligned(launch.y) && IsAligned(w.codes) && IsHopper();
}

cudaError_t LaunchWide(const WideLaunch& launch, cudaStream_t stream) {
  return launch.type == Type::kFloat16 ? LaunchWideFloat16(launch, stream) : LaunchWideBfloat16(launch, stream);
}

bool Encode(CUtensorMap* map, CUtensorMapDataType type, const void* matrix, int64_t rows, int64_t columns, int box_rows,
            int box_columns, CUtensorMapSwizzle swizzle) {
  static const PFN_cuTensorMapEncodeTiled_v12000 encode = FindEncoder();
  const cuuint64_t bytes = type == CU_TENSOR_MAP_DATA_TYPE_UINT8 ? 1 : 2;
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(columns) * bytes};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t steps[] = {1, 1};
  return encode != nullptr &&
         encode(map, type, 2, const_cast<void*>(matrix), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace any4
