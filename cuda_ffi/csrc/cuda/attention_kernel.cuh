// The kernels of decode attention.
#pragma once

#include "attention_combine.cuh"

namespace any4 {
namespace {

// Grid: parts of the slots, rows * groups, and chunks of kHeads of a group's query heads. The parts are a cluster if
// `clustered`; else a launch of CombineParts follows, unless there is one part.
template <typename T, int kSize>
__global__ void __launch_bounds__(PartOf<kSize>::kThreads)
    AttendPart(const __grid_constant__ AttentionStep step, const bool clustered) {
  using Of = PartOf<kSize>;
  extern __shared__ uint4 shared[];
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
  const int parts = gridDim.x, part = blockIdx.x, pair = blockIdx.y;
  const int row = pair / step.groups, group = pair % step.groups, heads = step.heads / step.groups;
  const int head = group * heads + blockIdx.z * kHeads, stop = (group + 1) * heads;
  uint4* const stage = shared + warp * 2 * Of::kTilePieces;
  float* const pushed = reinterpret_cast<float*>(shared + warps * 2 * Of::kTilePieces);
  float* const found = pushed + Of::kPushed;
  T* const new_key = reinterpret_cast<T*>(found + warps * kFound);
  T* const new_value = new_key + kSize;
  T* const queries = new_value + kSize;
  const int quads = min(kHeads, stop - head) * (kSize / 4);
  const PartSums<kSize> sums(pushed, quads);
  if (clustered) sums.Announce();

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
  const Token<T, kSize> token(step, row, group, head, stop);
  fetch_keys(n);
  fetch_values(n);
  token.Store(queries, new_key, new_value);
  __syncthreads();

  Running<T, kSize> running(queries);
  for (; n < count; n += stride) {
    const int tile = first_tile + n;
    float scores[4][4] = {};
    __pipeline_wait_prior(1);
    tiles.PatchKeys(tile, new_key);
    __syncwarp();
    running.Products(tiles, scores);
    __syncwarp();
    fetch_keys(n + stride);
    running.Weigh(step, seen, tile, scores);
    __pipeline_wait_prior(1);
    tiles.PatchValues(tile, new_value);
    __syncwarp();
    running.Mix(tiles, scores);
    __syncwarp();
    fetch_values(n + stride);
  }
  // The warp's sums take the place of its tiles.
  running.Leave(reinterpret_cast<float*>(stage), found + warp * kFound);
  CombineWarps<T>(step, reinterpret_cast<float*>(shared), 8 * Of::kTilePieces, found, sums, clustered, row, head, quads);
  // No block reads what is written here: each puts the new token in place of what it read, and derives its slot.
  if (part == 0 && blockIdx.z == 0) {
    for (int i = threadIdx.x; i < step.size; i += blockDim.x) {
      static_cast<T*>(step.keys)[(static_cast<int64_t>(pair) * step.size + i) * step.slots + seen.at] = new_key[i];
      static_cast<T*>(step.values)[(static_cast<int64_t>(pair) * step.slots + seen.at) * step.size + i] = new_value[i];
    }
    if (pair == 0 && threadIdx.x == 0) *step.length = step.positions[0] + step.start[0] + 1;
  }
}

// A block for each head of each row.
template <typename T>
__global__ void __launch_bounds__(kMostSize) CombineParts(const __grid_constant__ AttentionStep step, const int parts) {
  if (threadIdx.x < step.size) Combine<T>(step, blockIdx.x, threadIdx.x, parts);
}

}  // namespace
}  // namespace any4
