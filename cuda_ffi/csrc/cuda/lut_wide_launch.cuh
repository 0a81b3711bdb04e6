// Chooses the instance of LutWide and its grid. Several files include this one, so that they compile in parallel.
#pragma once

#include <algorithm>
#include <atomic>

#include "device.h"
#include "lut_launch.h"
#include "lut_wide.cuh"
#include "lut_wide.h"

namespace any4 {
namespace {

// How many clusters of an instance the device has room for at a time. Each device is asked once.
template <typename T, typename Of>
cudaError_t Resident(cudaLaunchConfig_t config, int* clusters) {
  constexpr int kMostDevices = 64;
  static std::atomic<int> known[kMostDevices];
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const bool keep = device < kMostDevices;
  *clusters = keep ? known[device].load() : 0;
  if (*clusters > 0) return cudaSuccess;
  const auto kernel = LutWide<T, Of>;
  if (const cudaError_t error =
          cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, Of::kSharedBytes);
      error != cudaSuccess) {
    return error;
  }
  config.gridDim = Of::kCluster;
  const cudaError_t error = cudaOccupancyMaxActiveClusters(clusters, kernel, &config);
  *clusters = std::max(*clusters, 1);
  if (error == cudaSuccess && keep) known[device].store(*clusters);
  return error;
}

}  // namespace

template <typename T, typename Of>
cudaError_t LaunchWideInstance(const WideLaunch& launch, cudaStream_t stream) {
  const LutWeight& w = launch.w;
  const auto type = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  WideMaps maps;
  if (!Encode(&maps.x, type, launch.x, launch.m, w.k, Of::kColumns / Of::kCluster, kStepInputs,
              CU_TENSOR_MAP_SWIZZLE_128B) ||
      !Encode(&maps.codes, CU_TENSOR_MAP_DATA_TYPE_UINT8, w.codes, w.stack * w.n, w.k / 2, Of::kRows, kStepInputs / 2,
              CU_TENSOR_MAP_SWIZZLE_32B) ||
      !Encode(&maps.y, type, launch.y, launch.m, w.n, Of::kColumns, 64, CU_TENSOR_MAP_SWIZZLE_128B)) {
    return cudaErrorInvalidValue;
  }
  WideGrid grid{};
  grid.columns = static_cast<int>((launch.m + Of::kColumns - 1) / Of::kColumns);
  constexpr int kClusterRows = Of::kRows * Of::kCluster;
  grid.tiles = static_cast<int>((w.n + kClusterRows - 1) / kClusterRows) * grid.columns;
  grid.steps = static_cast<int>((w.k + kStepInputs - 1) / kStepInputs);
  while (grid.group_shift < 30 && int64_t{1} << grid.group_shift < launch.group_size) ++grid.group_shift;
  grid.last_group = static_cast<int>(w.groups - 1);

  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {Of::kCluster, 1, 1};
  cudaLaunchConfig_t config{};
  config.attrs = &cluster;
  config.numAttrs = 1;
  config.blockDim = Of::kThreads;
  config.dynamicSmemBytes = Of::kSharedBytes;
  config.stream = stream;
  int clusters = 0;
  if (const cudaError_t error = Resident<T, Of>(config, &clusters); error != cudaSuccess) return error;
  config.gridDim = Of::kCluster * std::min(grid.tiles, clusters);
  return cudaLaunchKernelEx(&config, LutWide<T, Of>, maps, w, grid);
}

// Launches the instance that should finish first: by the number of tiles that each multiprocessor computes one after
// the other, and the nanoseconds that a step of one was measured to take on an H100 (lut_wide.md).
template <typename T, int kGroups, Type kScale>
cudaError_t LaunchWideScales(const WideLaunch& launch, cudaStream_t stream) {
  const int64_t multiprocessors = Multiprocessors();
  const auto nanoseconds = [&](int64_t columns, int64_t rows, int64_t of_step) {
    const int64_t tiles = ((launch.m + columns - 1) / columns) * ((launch.w.n + rows - 1) / rows);
    return (tiles + multiprocessors - 1) / multiprocessors * of_step;
  };
  const int64_t times[] = {nanoseconds(256, 128, 850), nanoseconds(128, 128, 570), nanoseconds(128, 64, 360),
                           nanoseconds(64, 64, 270)};
  switch (std::min_element(times, times + 4) - times) {
    case 0: return LaunchWideInstance<T, WideOf<256, 2, 1, 2, 4, kGroups, kScale>>(launch, stream);
    case 1: return LaunchWideInstance<T, WideOf<128, 2, 1, 1, 6, kGroups, kScale>>(launch, stream);
    case 2: return LaunchWideInstance<T, WideOf<128, 1, 2, 2, 8, kGroups, kScale>>(launch, stream);
    default: return LaunchWideInstance<T, WideOf<64, 1, 3, 1, 12, kGroups, kScale>>(launch, stream);
  }
}

template <typename T, Type kScale>
cudaError_t LaunchWideGroups(const WideLaunch& launch, cudaStream_t stream) {
  return launch.group_size < 2 * kStepInputs ? LaunchWideScales<T, 2, kScale>(launch, stream)
                                             : LaunchWideScales<T, 1, kScale>(launch, stream);
}

}  // namespace any4
