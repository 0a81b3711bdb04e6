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

bool IsForWide(const WideLaunch& launch, int bits) {
  const LutWeight& w = launch.w;
  // n % 8 == 0 lets rows of y begin at multiples of 16 bytes; those of x and of codes do so, since k % 32 == 0.
  if (bits != 4 || launch.group_size < 32 || w.n % 8 != 0) return false;
  if (w.stack * w.n > INT_MAX || launch.m > INT_MAX / 2 || w.k > INT_MAX / 2) return false;
  if (!IsAligned(launch.x) || !IsAligned(launch.y) || !IsAligned(w.codes)) return false;
  const bool exponents = w.scale_type == Type::kE8m0 && launch.type == Type::kBfloat16;
  const bool halves = w.scale_type == Type::kFloat16 && launch.type == Type::kFloat16;
  if (!exponents && !halves && w.scale_type != Type::kBfloat16) return false;
  const Type offset_type = exponents ? Type::kBfloat16 : w.scale_type;
  return (w.offsets == nullptr || w.offset_type == offset_type) && IsHopper();
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
