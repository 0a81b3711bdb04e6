// The kernel of decode attention over a KVQuant cache.
#pragma once

#include "attention_combine.cuh"
#include "kivi_running.cuh"
#include "kvquant_turn.cuh"

namespace any4 {
namespace {

// Grid: as that of AttendPart. Each warp has tiles that follow one another, so that it turns its queries seldom.
template <typename T, int kSize, int kBits>
__global__ void __launch_bounds__(KVQuantPart<kSize>::kThreads)
    AttendLevels(const __grid_constant__ KVQuantStep step, const bool clustered) {
  using Of = KVQuantPart<kSize>;
  constexpr int kQuery = PartOf<kSize>::kQuery;
  extern __shared__ uint4 shared[];
  const AttentionStep& token = step.token;
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
  const int parts = gridDim.x, part = blockIdx.x, pair = blockIdx.y;
  const int row = pair / token.groups, group = pair % token.groups, heads = token.heads / token.groups;
  const int head = group * heads + blockIdx.z * kHeads, stop = (group + 1) * heads;
  char* const stage = reinterpret_cast<char*>(shared) + warp * Of::kStageBytes;
  char* const table = reinterpret_cast<char*>(shared) + warps * Of::kStageBytes;
  uint32_t* const levels = reinterpret_cast<uint32_t*>(table + Of::kTableBytes);
  float* const pushed = reinterpret_cast<float*>(levels + Of::kLevelBytes / 4);
  float* const found = pushed + PartOf<kSize>::kPushed;
  T* const scales = reinterpret_cast<T*>(found + warps * kFound);
  T* const offsets = scales + kSize;
  T* const queries = offsets + kSize;
  const int quads = min(kHeads, stop - head) * (kSize / 4);
  const PartSums<kSize> sums(pushed, quads);
  if (clustered) sums.Announce();

  const Kept kept(step, row);
  KVQuantTiles<T, kSize, kBits, false> keys(step, step.keys, kept, row, pair, step.first_keys, token.keys, stage,
                                            stage + Of::kRowsBytes, levels, scales, offsets);
  KVQuantTiles<T, kSize, kBits, true> values(step, step.values, kept, row, pair, step.first_values, token.values, stage,
                                             stage + Of::kRowsBytes + 2 * Of::kSlotBytes, levels + 8, scales, offsets);
  const int begin = kept.first / Of::kTokens, count = kept.own < 0 ? 0 : kept.own / Of::kTokens - begin + 1;
  const auto share = [&](int n) { return begin + static_cast<int>(int64_t{count} * n / (parts * warps)); };
  int tile = share(part * warps + warp);
  const int last = share(part * warps + warp + 1);
  if (tile < last) {
    keys.Fetch(tile), values.Fetch(tile);
    keys.FetchSlots(tile), values.FetchSlots(tile);
  }
  const Places<kSize> places(table);
  places.Store(step.cos, step.sin);
  if (warp < 2) StoreLevels<T, kBits>(warp == 0 ? step.keys.levels : step.values.levels, levels + 8 * warp);
  for (int i = threadIdx.x; i < kSize; i += blockDim.x) {
    scales[i] = static_cast<T>(__ldg(step.scales + group * kSize + i));
    offsets[i] = static_cast<T>(__ldg(step.offsets + group * kSize + i));
  }
  for (int o = threadIdx.x; o < kHeads * kSize; o += blockDim.x) {
    const int h = head + o / kSize, i = o % kSize;
    queries[o / kSize * kQuery + i] =
        h < stop ? static_cast<const T*>(token.queries)[(row * int64_t{token.heads} + h) * kSize + i] : static_cast<T>(0.0f);
  }
  __syncthreads();

  KiviRunning<T, kSize> running(token, queries);
  TurnedQueries<T, kSize> turned(step, running.queries);
  for (; tile < last; ++tile) {
    float scores[4];
    turned.Turn(tile * Of::kTokens / kTurn);
    __pipeline_wait_prior(1);
    __syncwarp();
    keys.Fill(tile, tile + 1, last);
    turned.Products(keys, places, tile, scores);
    const int from = tile * Of::kTokens + threadIdx.x % 4 * 2;
    running.Weigh(scores, kept.first, kept.own, [&](int i) { return from + i / 2 * 8 + i % 2; });
    __pipeline_wait_prior(1);
    __syncwarp();
    values.Fill(tile, tile + 1, last);
    running.MixRecent(values, scores);
    __syncwarp();
  }
  __pipeline_wait_prior(0);
  __syncwarp();
  // The warp's sums take the place of its tile.
  running.Leave(reinterpret_cast<float*>(stage), found + warp * kFound);
  CombineWarps<T>(token, reinterpret_cast<float*>(shared), Of::kStageBytes / 4, found, sums, clustered, row, head, quads);
}

}  // namespace
}  // namespace any4
