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

// The launch of clusters of an instance, before the grid is known.
template <typename Of>
struct WideClusters {
  cudaLaunchAttribute dimension{};
  cudaLaunchConfig_t config{};

  explicit WideClusters(cudaStream_t stream) {
    dimension.id = cudaLaunchAttributeClusterDimension;
    dimension.val.clusterDim = {Of::kCluster, 1, 1};
    config.attrs = &dimension;
    config.numAttrs = 1;
    config.gridDim = Of::kCluster;
    config.blockDim = Of::kThreads;
    config.dynamicSmemBytes = Of::kSharedBytes;
    config.stream = stream;
  }
  WideClusters(const WideClusters&) = delete;
};

// How many clusters of an instance the device has room for at a time. Each device is asked once.
template <typename T, typename Of>
cudaError_t Resident(int* clusters) {
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
  const WideClusters<Of> launched(nullptr);
  const cudaError_t error = cudaOccupancyMaxActiveClusters(clusters, kernel, &launched.config);
  *clusters = std::max(*clusters, 1);
  if (error == cudaSuccess && keep) known[device].store(*clusters);
  return error;
}

int64_t TilesOf(int64_t count, int64_t of_tile) { return (count + of_tile - 1) / of_tile; }

// The steps of each part of a row but the last. A pair of steps may share its scales, so parts begin with a pair.
int64_t WidePartSteps(int64_t k, int64_t parts) { return 2 * TilesOf(TilesOf(k, 2 * kStepInputs), parts); }

}  // namespace

template <typename T, typename Of>
cudaError_t LaunchWideInstance(const WideLaunch& launch, cudaStream_t stream) {
  const LutWeight& w = launch.w;
  const auto type = std::is_same_v<T, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  WideMaps maps;
  if (!Encode(&maps.x, type, launch.x, launch.m, w.k, Of::kColumns / Of::kSharers, kStepInputs,
              CU_TENSOR_MAP_SWIZZLE_128B) ||
      !Encode(&maps.codes, CU_TENSOR_MAP_DATA_TYPE_UINT8, w.codes, w.stack * w.n, w.k / 2, Of::kRows, kStepInputs / 2,
              CU_TENSOR_MAP_SWIZZLE_32B) ||
      !Encode(&maps.y, type, launch.y, launch.m, w.n, Of::kShareColumns, 64, CU_TENSOR_MAP_SWIZZLE_128B)) {
    return cudaErrorInvalidValue;
  }
  WideGrid grid{};
  grid.columns = static_cast<int>(TilesOf(launch.m, Of::kColumns));
  grid.tiles = static_cast<int>(TilesOf(w.n, Of::kRows * Of::kSharers)) * grid.columns;
  grid.steps = static_cast<int>(TilesOf(w.k, kStepInputs));
  grid.part_steps = static_cast<int>(WidePartSteps(w.k, Of::kParts));
  while (grid.group_shift < 30 && int64_t{1} << grid.group_shift < launch.group_size) ++grid.group_shift;
  grid.last_group = static_cast<int>(w.groups - 1);

  int clusters = 0;
  if (const cudaError_t error = Resident<T, Of>(&clusters); error != cudaSuccess) return error;
  WideClusters<Of> launched(stream);
  // A cluster that splits K computes one tile: its stages then receive sums.
  launched.config.gridDim = Of::kCluster * (Of::kParts > 1 ? grid.tiles : std::min(grid.tiles, clusters));
  return cudaLaunchKernelEx(&launched.config, LutWide<T, Of>, maps, w, grid);
}

// The instance that should finish first of those considered: by the number of tiles that a cluster computes one after
// the other, and the nanoseconds that were measured (lut_wide.md) for each of its steps and for adding up parts.
template <typename T>
class WideChoice {
 public:
  explicit WideChoice(const WideLaunch& launch) : launch_(launch) {}

  template <typename Of>
  void Consider(int64_t of_step, int64_t of_parts = 0) {
    int clusters = 0;
    if (error_ == cudaSuccess) error_ = Resident<T, Of>(&clusters);
    if (error_ != cudaSuccess) return;
    const int64_t tiles = TilesOf(launch_.m, Of::kColumns) * TilesOf(launch_.w.n, Of::kRows * Of::kSharers);
    const int64_t steps = WidePartSteps(launch_.w.k, Of::kParts), rounds = TilesOf(tiles, clusters);
    // Each part needs a step at least, and more tiles than clusters fill the GPU without parts.
    if (Of::kParts > 1 && (steps >= TilesOf(launch_.w.k, kStepInputs) || rounds > 1)) return;
    const int64_t nanoseconds = rounds * steps * of_step + of_parts;
    if (launch_instance_ != nullptr && nanoseconds >= least_) return;
    least_ = nanoseconds;
    launch_instance_ = LaunchWideInstance<T, Of>;
  }

  cudaError_t Launch(cudaStream_t stream) const {
    return error_ == cudaSuccess ? launch_instance_(launch_, stream) : error_;
  }

 private:
  const WideLaunch& launch_;
  int64_t least_ = 0;
  cudaError_t (*launch_instance_)(const WideLaunch&, cudaStream_t) = nullptr;
  cudaError_t error_ = cudaSuccess;
};

template <typename T, int kGroups, Type kScale>
cudaError_t LaunchWideScales(const WideLaunch& launch, cudaStream_t stream) {
  WideChoice<T> choice(launch);
  choice.template Consider<WideOf<256, 2, 1, 2, 1, 4, kGroups, kScale>>(740);
  choice.template Consider<WideOf<256, 2, 1, 1, 2, 4, kGroups, kScale>>(730, 3000);
  choice.template Consider<WideOf<128, 2, 1, 1, 1, 6, kGroups, kScale>>(500);
  choice.template Consider<WideOf<128, 2, 1, 1, 2, 6, kGroups, kScale>>(530, 1300);
  choice.template Consider<WideOf<128, 1, 2, 1, 2, 8, kGroups, kScale>>(280, 1000);
  choice.template Consider<WideOf<64, 1, 3, 1, 1, 12, kGroups, kScale>>(215);
  choice.template Consider<WideOf<64, 1, 3, 1, 2, 12, kGroups, kScale>>(230, 700);
  return choice.Launch(stream);
}

template <typename T, Type kScale>
cudaError_t LaunchWideGroups(const WideLaunch& launch, cudaStream_t stream) {
  return launch.group_size < 2 * kStepInputs ? LaunchWideScales<T, 2, kScale>(launch, stream)
                                             : LaunchWideScales<T, 1, kScale>(launch, stream);
}

}  // namespace any4
