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
// From so many slots on, to use all multiprocessors is worth a second launch.
constexpr int kLong = 8192;

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

// A kernel, the most threads of its blocks, how many tiles of how many slots it takes side by side, how many warps a block
// has beside those that take them, and the shared memory for a number of warps; the rest of this file is the same for all.
template <typename T, int kSize>
struct DenseForm {
  using Element = T;
  static constexpr int kThreads = PartOf<kSize>::kThreads, kSide = 2, kMore = 0, kSlots = kTile;
  static constexpr bool kSplits = false;
  static auto Kernel() { return AttendPart<T, kSize>; }
  static int SharedBytes(int warps) { return PartOf<kSize>::SharedBytes(warps); }
};

template <typename Form>
Room MeasureRoom() {
  Room room;
  const auto kernel = Form::Kernel();
  const int most_bytes = DeviceAttribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  room.warps = Form::kThreads / 32;
  while (room.warps > Form::kSide && Form::SharedBytes(room.warps) > most_bytes) room.warps -= Form::kSide;
  const int bytes = Form::SharedBytes(room.warps);
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
template <typename Form>
Room RoomHere() {
  constexpr int kMostDevices = 64;
  static Room rooms[kMostDevices];
  static std::once_flag asked[kMostDevices];
  int device = 0;
  Room room;
  if ((room.error = cudaGetDevice(&device)) != cudaSuccess) return room;
  if (device >= kMostDevices) return MeasureRoom<Form>();
  std::call_once(asked[device], [&] { rooms[device] = MeasureRoom<Form>(); });
  return rooms[device];
}

// A `Step` is what the kernel takes; `token` is its token, and `slots` how many a row may see.
template <typename Form, typename Step>
cudaError_t LaunchParts(const Step& step, const AttentionStep& token, int slots, cudaStream_t stream) {
  const Room room = RoomHere<Form>();
  if (room.error != cudaSuccess) return room.error;
  const int chunks = (token.heads / token.groups + kHeads - 1) / kHeads, blocks = token.rows * token.groups * chunks;
  // As many parts as run at once, each with two tiles or more.
  const auto most = [&](const auto& at_once) {
    int log = 4;
    while (log > 0 && (at_once(log) < blocks || (2 * Form::kSlots << log) > slots)) --log;
    return log;
  };
  int log = most([&](int log) { return room.at_once[log]; });
  bool clustered = room.clusters && log > 0;
  // Where clusters leave multiprocessors idle, a second launch takes less time than they would.
  if (Form::kSplits && slots >= kLong) {
    const int wider = most([&](int log) { return Multiprocessors() >> log; });
    if (wider > log) log = wider, clustered = false;
  }
  const int parts = 1 << log;
  // No more than there are tiles for.
  const int tiles = (slots + Form::kSlots * parts - 1) / (Form::kSlots * parts);
  const int wanted = (tiles + Form::kSide - 1) / Form::kSide * Form::kSide;
  const int warps = std::min(room.warps, std::max(kFewWarps, wanted) + Form::kMore);
  cudaLaunchAttribute cluster{};
  cudaLaunchConfig_t config =
      ConfigOf(dim3(parts, token.rows * token.groups, chunks), warps, Form::SharedBytes(warps), &cluster);
  config.stream = stream;
  config.numAttrs = clustered ? 1 : 0;
  const cudaError_t error = cudaLaunchKernelEx(&config, Form::Kernel(), step, clustered);
  if (error != cudaSuccess || clustered || parts == 1) return error;
  CombineParts<typename Form::Element><<<token.rows * token.heads, kMostSize, 0, stream>>>(token, parts);
  return cudaGetLastError();
}

template <typename T, int kSize>
cudaError_t LaunchDense(const AttentionStep& step, cudaStream_t stream) {
  return LaunchParts<DenseForm<T, kSize>>(step, step, step.slots, stream);
}

template <typename T>
cudaError_t LaunchAttention(const AttentionStep& step, cudaStream_t stream) {
  if (step.size <= 64) return LaunchDense<T, 64>(step, stream);
  return step.size <= 128 ? LaunchDense<T, 128>(step, stream) : LaunchDense<T, 256>(step, stream);
}

}  // namespace
}  // namespace any4
