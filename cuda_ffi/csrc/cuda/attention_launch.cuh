// The choice of the grid of decode attention. Several files include this one, so that they compile in parallel.
#pragma once

#include <algorithm>
#include <mutex>

#include "attention_kernel.cuh"
#include "device.h"

namespace any4 {
namespace {

// Enough to load the token, and to combine the sums.
constexpr int kFewWarps = 8;

inline int DeviceAttribute(cudaDeviceAttr attribute) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

// What a device has room for.
struct Room {
  cudaError_t error = cudaSuccess;
  bool clusters = false;
  int warps = 0;       // of a block
  int at_once[5] = {};  // groups of 1, 2, 4, 8 and 16 blocks that run at a time
};

// Before Hopper, whose clusters synchronize, a second launch combines the parts.
inline cudaLaunchConfig_t ConfigOf(dim3 grid, int warps, int bytes, cudaLaunchAttribute* cluster) {
  cluster->id = cudaLaunchAttributeClusterDimension;
  cluster->val.clusterDim = {grid.x, 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = 32 * warps;
  config.dynamicSmemBytes = bytes;
  config.attrs = cluster;
  config.numAttrs = 1;
  return config;
}

template <typename T, int kSize>
Room MeasureRoom() {
  Room room;
  const auto kernel = AttendPart<T, kSize>;
  const int most_bytes = DeviceAttribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  room.warps = PartOf<kSize>::kThreads / 32;
  while (room.warps > 2 && PartOf<kSize>::SharedBytes(room.warps) > most_bytes) room.warps -= 2;
  const int bytes = PartOf<kSize>::SharedBytes(room.warps);
  room.error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  room.clusters = DeviceAttribute(cudaDevAttrClusterLaunch) != 0;
  if (room.clusters) {
    // Not all GPUs have clusters of 16 blocks.
    cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  }
  for (int i = 0; i < 5; ++i) {
    room.at_once[i] = Multiprocessors() >> i;
    if (!room.clusters) continue;
    cudaLaunchAttribute cluster{};
    const cudaLaunchConfig_t config = ConfigOf(1 << i, room.warps, bytes, &cluster);
    int clusters = 0;
    const bool fits = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config) == cudaSuccess;
    room.at_once[i] = fits ? clusters : 0;
  }
  if (room.error == cudaSuccess) cudaGetLastError();
  return room;
}

// Each device is asked once.
template <typename T, int kSize>
Room RoomHere() {
  constexpr int kMostDevices = 64;
  static Room rooms[kMostDevices];
  static std::once_flag asked[kMostDevices];
  int device = 0;
  Room room;
  if ((room.error = cudaGetDevice(&device)) != cudaSuccess) return room;
  if (device >= kMostDevices) return MeasureRoom<T, kSize>();
  std::call_once(asked[device], [&] { rooms[device] = MeasureRoom<T, kSize>(); });
  return rooms[device];
}

template <typename T, int kSize>
cudaError_t LaunchParts(const AttentionStep& step, cudaStream_t stream) {
  const Room room = RoomHere<T, kSize>();
  if (room.error != cudaSuccess) return room.error;
  const int chunks = (step.heads / step.groups + kHeads - 1) / kHeads, pairs = step.rows * step.groups;
  // As many parts as run at once, each with two tiles or more.
  int log = 4;
  while (log > 0 && (room.at_once[log] < pairs * chunks || (2 * kTile << log) > step.slots)) --log;
  const int parts = 1 << log;
  const bool clustered = room.clusters && parts > 1;
  // No more than there are tiles for.
  const int tiles = (step.slots + kTile * parts - 1) / (kTile * parts);
  const int warps = std::min(room.warps, std::max(kFewWarps, tiles + tiles % 2));
  cudaLaunchAttribute cluster{};
  cudaLaunchConfig_t config = ConfigOf(dim3(parts, pairs, chunks), warps, PartOf<kSize>::SharedBytes(warps), &cluster);
  config.stream = stream;
  config.numAttrs = clustered ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, AttendPart<T, kSize>, step, clustered);
  if (error != cudaSuccess || clustered || parts == 1) return error;
  CombineParts<T><<<step.rows * step.heads, kMostSize, 0, stream>>>(step, parts);
  return cudaGetLastError();
}

template <typename T>
cudaError_t LaunchAttention(const AttentionStep& step, cudaStream_t stream) {
  if (step.size <= 64) return LaunchParts<T, 64>(step, stream);
  return step.size <= 128 ? LaunchParts<T, 128>(step, stream) : LaunchParts<T, 256>(step, stream);
}

}  // namespace
}  // namespace any4
