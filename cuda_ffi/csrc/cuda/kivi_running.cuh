// The attention of a warp over its tiles of a KIVI cache.
#pragma once

#include "attention_running.cuh"
#include "kivi_recent.cuh"

namespace any4 {
namespace {

// A warp's softmax so far, as in attention_running.cuh. Lane l has the scores of head l / 4, and the sums of the heads
// 2 q and 2 q + 1 for the channels of part r of eight: those of its channels 2 i and 2 i + 1 are mixed[i].
//
// The loops over a tile of codes aren't unrolled: all their steps would not fit into the instruction cache.
template <typename T, int kSize>
struct KiviRunning {
  using Of = KiviPart<kSize>;
  static constexpr int kSteps = kSize / 16;

  const AttentionStep& step;
  const T* const queries;    // of the lane's head
  float highest = kNothing;  // the highest score, in powers of two
  float total = 0;           // of this lane's tokens
  float mixed[kSteps][4] = {};

  __device__ KiviRunning(const AttentionStep& step, const T* queries)
      : step(step), queries(queries + threadIdx.x % 32 / 4 * PartOf<kSize>::kQuery) {}

  // The scores of the tokens 16 q to 16 q + 15 of a tile.
  template <int kBits>
  __device__ void CodedProducts(const CodeTiles<T, kSize>& tiles, int tile, float (&scores)[16]) const {
    const uint32_t group = tiles.IsSecond(tile) ? kHighHalves : kLowHalves;
    float sums[8][4] = {};
#pragma unroll 2
    for (int k = 0; k < kSteps; ++k) {
      uint32_t codes[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) codes[i] = tiles.template KeyCodes<kBits>(k, i);
      const uint4 steps = tiles.KeySteps(k), lowest = tiles.KeyLowest(k);
      const uint32_t step[2] = {__byte_perm(steps.x, steps.y, group), __byte_perm(steps.z, steps.w, group)};
      const uint32_t least[2] = {__byte_perm(lowest.x, lowest.y, group), __byte_perm(lowest.z, lowest.w, group)};
      const uint2 query = *reinterpret_cast<const uint2*>(queries + 16 * k + 4 * (threadIdx.x % 4));
      // Rows of the other eight heads, of which there are none.
      const uint32_t a[4] = {query.x, 0, query.y, 0};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        MultiplyAdd<T>(sums[j], a, Decoded<T, kBits>(Paired<kBits>(codes[0], codes[1], j), step[0], least[0]),
                       Decoded<T, kBits>(Paired<kBits>(codes[2], codes[3], j), step[1], least[1]));
      }
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) scores[i] = sums[i % 8][i / 8];
  }

  // The scores of the tokens 8 (i / 2) + 2 q + i % 2 of a recent tile.
  __device__ void RecentProducts(const RecentTiles<T, kSize>& tiles, float (&scores)[4]) const {
    const int number = threadIdx.x % 32 / 8, r = threadIdx.x % 8;
    float sums[2][4] = {};
#pragma unroll 2
    for (int k = 0; k < kSteps; ++k) {
      const T* const from = queries + 16 * k + 2 * (threadIdx.x % 4);
      const uint32_t a[4] = {*reinterpret_cast<const uint32_t*>(from), 0, *reinterpret_cast<const uint32_t*>(from + 8), 0};
      uint32_t keys[4];
      LoadMatrices(tiles.Key(number / 2 * 8 + r, 2 * k + number % 2), keys);
      MultiplyAdd<T>(sums[0], a, keys[0], keys[1]);
      MultiplyAdd<T>(sums[1], a, keys[2], keys[3]);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) scores[i] = sums[i / 2][i % 2];
  }

  // Turns products into weights, and fades what was mixed before. Score i is that of token of(i), and counts from `first`
  // to `last`.
  template <int kCount, typename TokenOf>
  __device__ void Weigh(float (&scores)[kCount], int first, int last, const TokenOf& of) {
    const int lane = threadIdx.x % 32;
    if (step.softcap > 0) {
#pragma unroll 1
      for (int n = 0; n < kCount; ++n) {
        const float score = step.softcap * kLog2e * tanhf(step.scale * scores[0] / step.softcap);
#pragma unroll
        for (int i = 1; i < kCount; ++i) scores[i - 1] = scores[i];
        scores[kCount - 1] = score;
      }
    } else {
#pragma unroll
      for (int i = 0; i < kCount; ++i) scores[i] *= step.scale * kLog2e;
    }
    float most = highest;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      scores[i] = of(i) >= first && of(i) <= last ? scores[i] : kNothing;
      most = fmaxf(most, scores[i]);
    }
    most = fmaxf(most, __shfl_xor_sync(kAll, most, 1));
    most = fmaxf(most, __shfl_xor_sync(kAll, most, 2));
    const float fade = Power(highest - most);
    highest = most;
    total *= fade;
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      scores[i] = scores[i] == kNothing ? 0 : Power(scores[i] - most);
      total += scores[i];
    }
    const float fades[2] = {__shfl_sync(kAll, fade, 8 * (lane % 4)), __shfl_sync(kAll, fade, 8 * (lane % 4) + 4)};
#pragma unroll
    for (int t = 0; t < kSteps; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) mixed[t][i] *= fades[i % 2];
    }
  }

  template <int kBits>
  __device__ void MixCodes(const CodeTiles<T, kSize>& tiles, const float (&weights)[16]) {
    uint32_t high[8], low[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const Split<T> two(weights[2 * i], weights[2 * i + 1]);
      high[i] = two.high, low[i] = two.low;
    }
#pragma unroll 1
    for (int i = 0; i < 16; i += 4) {
      uint32_t codes[4][Of::kLane / 8], steps[2], lowest[2];
#pragma unroll
      for (int t = 0; t < 4; ++t) tiles.template ValueCodes<kBits>(i + t, codes[t]);
#pragma unroll
      for (int half = 0; half < 2; ++half) tiles.ValueFactors(i + 2 * half, steps[half], lowest[half]);
#pragma unroll
      for (int c = 0; c < kSteps; ++c) {
        uint32_t values[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const int channel = 2 * c + n % 2, half = n / 2;
          values[n] = Decoded<T, kBits>(
              Paired<kBits>(codes[2 * half][channel / 8], codes[2 * half + 1][channel / 8], channel % 8), steps[half],
              lowest[half]);
        }
        MultiplyAdd<T>(mixed[c], values, high[0], high[1]);
        MultiplyAdd<T>(mixed[c], values, low[0], low[1]);
      }
      // The next ones' weights, without an index into registers.
#pragma unroll
      for (int p = 2; p < 8; ++p) high[p - 2] = high[p], low[p - 2] = low[p];
    }
  }

  // Of a tile of 16 tokens, whose pieces of eight channels are at Value(token, piece).
  template <typename Tiles>
  __device__ void MixRecent(const Tiles& tiles, const float (&weights)[4]) {
    const int lane = threadIdx.x % 32;
    uint32_t words[4][Of::kLane / 2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int w = 0; w < Of::kLane / 8; ++w) {
        const uint4 eight = *tiles.Value(i / 2 * 8 + 2 * (lane % 4) + i % 2, lane / 4 * (Of::kLane / 8) + w);
        words[i][4 * w] = eight.x, words[i][4 * w + 1] = eight.y;
        words[i][4 * w + 2] = eight.z, words[i][4 * w + 3] = eight.w;
      }
    }
    const Split<T> first(weights[0], weights[1]), second(weights[2], weights[3]);
#pragma unroll
    for (int c = 0; c < kSteps; ++c) {
      uint32_t values[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        values[n] = __byte_perm(words[n / 2 * 2][c], words[n / 2 * 2 + 1][c], n % 2 == 0 ? kLowHalves : kHighHalves);
      }
      MultiplyAdd<T>(mixed[c], values, first.high, second.high);
      MultiplyAdd<T>(mixed[c], values, first.low, second.low);
    }
  }

  // As in attention_running.cuh.
  __device__ void Leave(float* sums, float* found) {
    const int lane = threadIdx.x % 32;
    total += __shfl_xor_sync(kAll, total, 1);
    total += __shfl_xor_sync(kAll, total, 2);
    if (lane % 4 == 0) found[lane / 4] = highest, found[kHeads + lane / 4] = total;
#pragma unroll
    for (int t = 0; t < kSteps; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[(2 * (lane % 4) + i % 2) * kSize + lane / 4 * Of::kLane + 2 * t + i / 2] = mixed[t][i];
      }
    }
  }
};

}  // namespace
}  // namespace any4
