// The kernels of decode attention, and the choice of their grid. Several files include this one, so that they compile
// in parallel.
#pragma once

#include <algorithm>
#include <mutex>

#include "attention_part.cuh"
#include "device.h"

namespace any4 {
namespace {

// The result's element (row's head, channel) from what its parts left: sums [size], their highest score, their total.
template <typename T>
__device__ __forceinline__ void Combine(const AttentionStep& step, int64_t head, int channel, int parts) {
  const float* const partials = step.partials + head * kMostParts * (step.size + 2);
  // All loads are under way at once.
  float heights[kMostParts], totals[kMostParts], sums[kMostParts], highest = kNothing, total = 0, mixed = 0;
#pragma unroll
  for (int p = 0; p < kMostParts; ++p) {
    const float* const part = partials + p * (step.size + 2);
    heights[p] = p < parts ? __ldcg(part + step.size) : kNothing;
    totals[p] = p < parts ? __ldcg(part + step.size + 1) : 0;
    sums[p] = p < parts ? __ldcg(part + channel) : 0;
  }
#pragma unroll
  for (int p = 0; p < kMostParts; ++p) highest = fmaxf(highest, heights[p]);
#pragma unroll
  for (int p = 0; p < kMostParts; ++p) {
    const float share = exp2f(heights[p] - highest);
    total = fmaf(share, totals[p], total);
    mixed = fmaf(share, sums[p], mixed);
  }
  static_cast<T*>(step.mixed)[head * step.size + channel] = static_cast<T>(total > 0 ? mixed / total : 0.0f);
}

__device__ __forceinline__ void SyncParts() {
#if __CUDA_ARCH__ >= 900
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Grid: parts of the slots, rows * groups, and chunks of kHeads of a group's query heads. The parts are a cluster if
// `clustered`; else a launch of CombineParts follows, unless there is one part.
template <typename T, int kSize>
__global__ void __launch_bounds__(kMostThreads)
    AttendPart(const __grid_constant__ AttentionStep step, const bool clustered) {
  using Of = PartOf<kSize>;
  extern __shared__ uint4 shared[];
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
  const int parts = gridDim.x, part = blockIdx.x, pair = blockIdx.y;
  const int row = pair / step.groups, group = pair % step.groups, heads = step.heads / step.groups;
  const int head = group * heads + blockIdx.z * kHeads, stop = (group + 1) * heads;
  uint4* const stage = shared + warp * 2 * Of::kTilePieces;
  float* const found = reinterpret_cast<float*>(shared + warps * 2 * Of::kTilePieces);
  T* const new_key = reinterpret_cast<T*>(found + warps * Of::kFound);
  T* const new_value = new_key + kSize;
  T* const queries = new_value + kSize;

  const Seen seen(step, row);
  const int first_tile = seen.first / kTile;
  const int count = seen.last < seen.first ? 0 : seen.last / kTile - first_tile + 1;
  Tiles<T, kSize> tiles(step, seen, pair, stage);
  // Blocks take two tiles in turn, side by side, since memory is read in pieces of 128 bytes.
  const int stride = parts * warps;
  int n = 2 * (part + parts * (warp / 2)) + warp % 2;
  const auto fetch_keys = [&](int n) {
    if (n < count) tiles.FetchKeys(first_tile + n);
    __pipeline_commit();
  };
  const auto fetch_values = [&](int n) {
    if (n < count) tiles.FetchValues(first_tile + n);
    __pipeline_commit();
  };
  fetch_keys(n);
  fetch_values(n);
  LoadToken<T, kSize>(step, row, group, head, stop, queries, new_key, new_value);
  __syncthreads();

  // No block reads what is written here: each puts the new token in place of what it read, and derives its slot.
  if (part == 0 && blockIdx.z == 0) {
    for (int i = threadIdx.x; i < step.size; i += blockDim.x) {
      static_cast<T*>(step.keys)[(static_cast<int64_t>(pair) * step.size + i) * step.slots + seen.at] = new_key[i];
      static_cast<T*>(step.values)[(static_cast<int64_t>(pair) * step.slots + seen.at) * step.size + i] = new_value[i];
    }
    if (pair == 0 && threadIdx.x == 0) *step.length = step.positions[0] + step.start[0] + 1;
  }

  Running<T, kSize> running(queries);
  for (; n < count; n += stride) {
    const int tile = first_tile + n;
    float scores[4][4] = {};
    __pipeline_wait_prior(1);
    tiles.PatchKeys(tile, new_key);
    __syncwarp();
    running.Products(tiles, step.size, scores);
    __syncwarp();
    fetch_keys(n + stride);
    running.Weigh(step, seen, tile, scores);
    __pipeline_wait_prior(1);
    tiles.PatchValues(tile, new_value);
    __syncwarp();
    running.Mix(tiles, step.size, scores);
    __syncwarp();
    fetch_values(n + stride);
  }
  // The warp's sums take the place of its tiles.
  running.Leave(step.size, reinterpret_cast<float*>(stage), found + warp * Of::kFound);
  __syncthreads();
  for (int o = threadIdx.x; o < min(kHeads, stop - head) * kSize; o += blockDim.x) {
    const int g = o / kSize, channel = o % kSize;
    if (channel >= step.size) continue;
    float highest = kNothing, total = 0, mixed = 0;
    for (int w = 0; w < warps; ++w) highest = fmaxf(highest, found[w * Of::kFound + g]);
#pragma unroll 4
    for (int w = 0; w < warps; ++w) {
      const float share = exp2f(found[w * Of::kFound + g] - highest);
      total = fmaf(share, found[w * Of::kFound + kHeads + g], total);
      mixed = fmaf(share, reinterpret_cast<float*>(shared + w * 2 * Of::kTilePieces)[g * kSize + channel], mixed);
    }
    const int64_t of_row = static_cast<int64_t>(row) * step.heads + head + g;
    if (parts == 1) {
      static_cast<T*>(step.mixed)[of_row * step.size + channel] = static_cast<T>(total > 0 ? mixed / total : 0.0f);
      continue;
    }
    float* const partial = step.partials + (of_row * kMostParts + part) * (step.size + 2);
    partial[channel] = mixed;
    if (channel == 0) partial[step.size] = highest, partial[step.size + 1] = total;
  }
  if (!clustered) return;
  SyncParts();
  for (int o = part * blockDim.x + threadIdx.x; o < min(kHeads, stop - head) * kSize; o += parts * blockDim.x) {
    if (o % kSize >= step.size) continue;
    Combine<T>(step, static_cast<int64_t>(row) * step.heads + head + o / kSize, o % kSize, parts);
  }
}

// A block for each head of each row.
template <typename T>
__global__ void __launch_bounds__(kMostSize) CombineParts(const __grid_constant__ AttentionStep step, const int parts) {
  if (threadIdx.x < step.size) Combine<T>(step, blockIdx.x, threadIdx.x, parts);
}

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
  room.warps = kMostThreads / 32;
  while (room.warps > 2 && PartOf<kSize>::SharedBytes(room.warps) > most_bytes) room.warps /= 2;
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
  cudaLaunchAttribute cluster{};
  cudaLaunchConfig_t config = ConfigOf(dim3(parts, pairs, chunks), room.warps,
                                       PartOf<kSize>::SharedBytes(room.warps), &cluster);
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
