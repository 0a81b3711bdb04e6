// The launch of LutWide: tensor maps and the grid.
#include "lut_wide.h"

#include <cudaTypedefs.h>

#include <algorithm>

#include "lut_wide.cuh"

namespace any4 {
namespace {

// The driver's function, without linking its library, which a machine without a GPU has not.
PFN_cuTensorMapEncodeTiled_v12000 Encoder() {
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
    const auto error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    const auto error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    const bool there = error == cudaSuccess && result == cudaDriverEntryPointSuccess;
    return there ? reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found) : nullptr;
  }();
  return encode;
}

// A matrix [rows, columns], of which boxes are copied.
bool Encode(CUtensorMap* map, CUtensorMapDataType type, int bytes, const void* at, int64_t rows, int64_t columns,
            int box_rows, int box_columns, CUtensorMapSwizzle swizzle) {
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(columns * bytes)};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)}, steps[] = {1, 1};
  return Encoder()(map, type, 2, const_cast<void*>(at), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
                   swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <typename T, typename Of>
cudaError_t LaunchOf(const LutWeight& w, void* y, int64_t group_size, const void* x, int64_t m, cudaStream_t stream) {
  const auto kernel = LutWide<T, Of>;
  const cudaError_t allowed =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Of::kSharedBytes);
  if (allowed != cudaSuccess) return allowed;
  const auto type = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  WideMaps maps;
  if (!Encode(&maps.x, type, 2, x, m, w.k, Of::kColumns / Of::kCluster, kStepInputs, CU_TENSOR_MAP_SWIZZLE_128B) ||
      !Encode(&maps.codes, CU_TENSOR_MAP_DATA_TYPE_UINT8, 1, w.codes, w.stack * w.n, w.k / 2, Of::kRows,
              kStepInputs / 2, CU_TENSOR_MAP_SWIZZLE_32B) ||
      !Encode(&maps.y, type, 2, y, m, w.n, Of::kColumns, 64, CU_TENSOR_MAP_SWIZZLE_128B)) {
    return cudaErrorInvalidValue;
  }
  WideGrid grid{};
  grid.columns = static_cast<int>((m + Of::kColumns - 1) / Of::kColumns);
  constexpr int kClusterRows = Of::kRows * Of::kCluster;
  grid.tiles = static_cast<int>((w.n + kClusterRows - 1) / kClusterRows) * grid.columns;
  grid.steps = static_cast<int>((w.k + kStepInputs - 1) / kStepInputs);
  while (grid.group_shift < 30 && int64_t{1} << grid.group_shift < group_size) ++grid.group_shift;

  grid.last_group = static_cast<int>(w.groups - 1);
  cudaLaunchConfig_t config{};
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {Of::kCluster, 1, 1};
  config.attrs = &cluster;
  config.numAttrs = 1;
  config.blockDim = Of::kThreads;
  config.dynamicSmemBytes = Of::kSharedBytes;
  config.stream = stream;
  config.gridDim = Of::kCluster;
  int clusters = 0;
  const cudaError_t known = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
  if (known != cudaSuccess) return known;
  config.gridDim = Of::kCluster * std::min(grid.tiles, std::max(clusters, 1));
  return cudaLaunchKernelEx(&config, kernel, maps, w, grid);
}

}  // namespace

template <typename T, int kGroups, Type kScale>
cudaError_t Choose(int choice, const LutWeight& w, void* y, int64_t group_size, const void* x, int64_t m, cudaStream_t stream) {
  switch (choice) {
    case 0: return LaunchOf<T, WideOf<256, 2, 1, 2, 4, kGroups, kScale>>(w, y, group_size, x, m, stream);
    case 1: return LaunchOf<T, WideOf<256, 2, 1, 1, 4, kGroups, kScale>>(w, y, group_size, x, m, stream);
    case 2: return LaunchOf<T, WideOf<128, 2, 1, 1, 6, kGroups, kScale>>(w, y, group_size, x, m, stream);
    case 3: return LaunchOf<T, WideOf<128, 1, 2, 2, 8, kGroups, kScale>>(w, y, group_size, x, m, stream);
    case 4: return LaunchOf<T, WideOf<64, 1, 3, 2, 12, kGroups, kScale>>(w, y, group_size, x, m, stream);
    default: return LaunchOf<T, WideOf<64, 1, 3, 1, 12, kGroups, kScale>>(w, y, group_size, x, m, stream);
  }
}

cudaError_t LaunchWide(int choice, const LutWeight& w, void* y, int64_t group_size, const void* x, int64_t m, Type type, cudaStream_t stream) {
#ifdef ONLY
  return Choose<__nv_bfloat16, 1, Type::kBfloat16>(choice, w, y, group_size, x, m, stream);
#else
  if (w.scale_type == Type::kE8m0) return Choose<__nv_bfloat16, 2, Type::kE8m0>(choice, w, y, group_size, x, m, stream);
  if (type == Type::kBfloat16) return group_size == 32 ? Choose<__nv_bfloat16, 2, Type::kBfloat16>(choice, w, y, group_size, x, m, stream) : Choose<__nv_bfloat16, 1, Type::kBfloat16>(choice, w, y, group_size, x, m, stream);
  if (w.scale_type == Type::kFloat16) return group_size == 32 ? Choose<__half, 2, Type::kFloat16>(choice, w, y, group_size, x, m, stream) : Choose<__half, 1, Type::kFloat16>(choice, w, y, group_size, x, m, stream);
  return group_size == 32 ? Choose<__half, 2, Type::kBfloat16>(choice, w, y, group_size, x, m, stream) : Choose<__half, 1, Type::kBfloat16>(choice, w, y, group_size, x, m, stream);
#endif
}

}  // namespace any4
