// The kernel of decode attention over a KIVI cache.
#pragma once

#include "attention_combine.cuh"
#include "kivi_append.cuh"
#include "kivi_running.cuh"

namespace any4 {
namespace {

// Grid: as that of AttendPart, with one chunk. The last warp of a block is of no group, and begins with recent tiles; of
// these, as many warps of other blocks or of its own take one as there are.
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
  const Token<T, kSize> arriving(token, row, group, head, head + heads);
  const CodeTiles<T, kSize> tiles(step, held, pair, reinterpret_cast<char*>(shared) + warp / Of::kSide * Of::kSide * Of::kTileBytes);
  constexpr int kQuad = Of::kSide * kTokens;
  const int teams = warps / Of::kSide, first = held.first / kQuad, side = warp % Of::kSide;
  const int stop = held.tail > held.first ? (held.tail - 1) / kQuad + 1 : first;
  int quad = warp < teams * Of::kSide ? first + part + parts * (warp / Of::kSide) : stop;
  const auto fetch_keys = [&](int quad) {
    if (quad < stop) step.key_bits == 4 ? tiles.template FetchKeys<4>(quad) : tiles.template FetchKeys<2>(quad);
    __pipeline_commit();
  };
  const auto fetch_values = [&](int quad) {
    const int tile = quad * Of::kSide + side;
    if (quad < stop) step.value_bits == 4 ? tiles.template FetchValues<4>(tile) : tiles.template FetchValues<2>(tile);
    __pipeline_commit();
  };
  const RecentTiles<T, kSize> recent(step, held, pair, stage);
  int n = part + parts * (warps - 1 - warp);
  const bool at_once = quad >= stop && n < recent.count();
  if (at_once) {
    recent.Fetch(recent.first() + n);
  } else {
    fetch_keys(quad);
    fetch_values(quad);
  }
  arriving.Store(queries, new_key, new_value);
  __syncthreads();

  KiviRunning<T, kSize> running(token, queries);
  for (; quad < stop; quad += parts * teams) {
    const int tile = quad * Of::kSide + side, next = quad + parts * teams;
    const bool counts = tiles.Counts(tile);
    float scores[16];
    __pipeline_wait_prior(1);
    tiles.SyncTeam();
    if (counts) {
      step.key_bits == 4 ? running.template CodedProducts<4>(tiles, tile, scores)
                         : running.template CodedProducts<2>(tiles, tile, scores);
    }
    tiles.SyncTeam();
    fetch_keys(next);
    __pipeline_wait_prior(1);
    __syncwarp();
    if (counts) {
      const int from = tile * kTokens + threadIdx.x % 4 * 16;
      running.Weigh(scores, held.first, held.tail - 1, [&](int i) { return from + i; });
      step.value_bits == 4 ? running.template MixCodes<4>(tiles, scores) : running.template MixCodes<2>(tiles, scores);
    }
    __syncwarp();
    fetch_values(next);
  }
  if (!at_once && n < recent.count()) recent.Fetch(recent.first() + n);
  for (; n < recent.count(); n += parts * warps) {
    const int tile = recent.first() + n;
    __pipeline_wait_prior(0);
    __syncwarp();
    recent.Patch(tile, new_key, new_value);
    if (held.SeesLeaving() && held.leaving() / kRecent == tile) Append(step, held, pair, new_key, new_value, &recent);
    __syncwarp();
    float scores[4];
    running.RecentProducts(recent, scores);
    const int from = tile * kRecent + threadIdx.x % 4 * 2;
    running.Weigh(scores, recent.seen(), held.own, [&](int i) { return from + i / 2 * 8 + i % 2; });
    running.MixRecent(recent, scores);
    __syncwarp();
    if (n + parts * warps < recent.count()) recent.Fetch(tile + parts * warps);
  }
  if (part == 0 && warp == warps - 1 && held.own >= 0 && !held.SeesLeaving()) {
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
