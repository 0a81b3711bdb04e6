// The kernel of decode attention over a KIVI cache.
#pragma once

#include "attention_combine.cuh"
#include "kivi_append.cuh"
#include "kivi_running.cuh"

namespace any4 {
namespace {

// Grid: as that of AttendPart, with one chunk.
template <typename T, int kSize>
__global__ void __launch_bounds__(KiviPart<kSize>::kThreads)
    AttendCodes(const __grid_constant__ KiviStep step, const bool clustered) {
  using Of = KiviPart<kSize>;
  extern __shared__ uint4 shared[];
  const AttentionStep& token = step.token;
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
  const int parts = gridDim.x, part = blockIdx.x, pair = blockIdx.y;
  const int row = pair / token.groups, group = pair % token.groups, heads = token.heads / token.groups;
  const int head = group * heads;
  uint4* const stage = shared + warp * (Of::kTileBytes / 16);
  float* const pushed = reinterpret_cast<float*>(shared + warps * (Of::kTileBytes / 16));
  float* const found = pushed + PartOf<kSize>::kPushed;
  T* const new_key = reinterpret_cast<T*>(found + warps * kFound);
  T* const new_value = new_key + kSize;
  T* const queries = new_value + kSize;
  const int quads = heads * (kSize / 4);
  const PartSums<kSize> sums(pushed, quads);
  if (clustered) sums.Announce();

  const Held held(step, row);
  // The newest tile, most of whose tokens are exact, takes longest, and so is the first.
  const int last_tile = held.own / kTokens;
  const int count = held.own < 0 ? 0 : last_tile - held.first / kTokens + 1;
  const CodeTiles<T, kSize> tiles(step, held, pair, stage);
  const int stride = parts * warps;
  int n = Of::kSide * (part + parts * (warp / Of::kSide)) + warp % Of::kSide;
  const auto fetch_keys = [&](int n) {
    if (n < count) tiles.FetchKeys(last_tile - n);
    __pipeline_commit();
  };
  const auto fetch_values = [&](int n) {
    if (n < count) tiles.FetchValues(last_tile - n);
    __pipeline_commit();
  };
  const Token<T, kSize> arriving(token, row, group, head, head + heads);
  fetch_keys(n);
  fetch_values(n);
  arriving.Store(queries, new_key, new_value);
  __syncthreads();

  KiviRunning<T, kSize> running(queries);
  for (; n < count; n += stride) {
    const int tile = last_tile - n;
    float scores[8][4] = {};
    __pipeline_wait_prior(1);
    __syncwarp();
    if (!tiles.HasKeys(tile)) {
      running.ExactProducts(token, held, pair, new_key, tile, scores);
    } else if (step.key_bits == 4) {
      running.template CodedProducts<4>(tiles, tile, scores);
    } else {
      running.template CodedProducts<2>(tiles, tile, scores);
    }
    __syncwarp();
    fetch_keys(n + stride);
    running.Weigh(token, held, tile, scores);
    __pipeline_wait_prior(1);
    __syncwarp();
    if (tiles.HasValues(tile)) {
      if (held.SeesLeaving() && held.leaving() / kTokens == tile) {
        Append(step, held, pair, new_key, new_value, &tiles);
        __syncwarp();
      }
      if (step.value_bits == 4) {
        running.template MixCodes<4>(tiles, tile, held.coded, scores);
      } else {
        running.template MixCodes<2>(tiles, tile, held.coded, scores);
      }
    }
    if ((tile + 1) * kTokens > held.coded) running.MixExact(token, held, pair, new_value, tile, scores);
    __syncwarp();
    fetch_values(n + stride);
  }
  if (part == 0 && warp == 0 && held.own >= 0 && !held.SeesLeaving()) {
    Append<T, kSize>(step, held, pair, new_key, new_value, nullptr);
  }
  __pipeline_wait_prior(0);
  // The warp's sums take the place of its tile.
  running.Leave(reinterpret_cast<float*>(stage), found + warp * kFound);
  CombineWarps<T>(token, reinterpret_cast<float*>(shared), Of::kTileBytes / 4, found, sums, clustered, row, head, quads);
  Flush<T, kSize>(step, held, pair, new_key);
  if (part == 0 && pair == 0 && threadIdx.x == 0) *token.length = token.positions[0] + token.start[0] + 1;
}

}  // namespace
}  // namespace any4
