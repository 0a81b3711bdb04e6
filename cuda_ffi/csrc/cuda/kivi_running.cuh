// The attention of a warp over its tiles of a KIVI cache.
#pragma once

#include "attention_running.cuh"
#include "kivi_numbers.cuh"
#include "kivi_tile.cuh"

namespace any4 {
namespace {

// A warp's softmax so far, as in attention_running.cuh. Lane l has the scores of head l / 4 for the tokens 16 q to
// 16 q + 15 of a tile: that of token 16 q + i is scores[i % 8][i / 8]. It has the sums of the heads 2 q and 2 q + 1 for
// the channels of part r of eight: those of its channels 2 i and 2 i + 1 are mixed[i].
template <typename T, int kSize>
struct KiviRunning {
  using Of = KiviPart<kSize>;
  static constexpr int kSteps = kSize / 16;

  uint32_t query[kSteps][2];
  float highest = kNothing;  // the highest score, in powers of two
  float total = 0;           // of this lane's tokens
  float mixed[kSteps][4] = {};

  __device__ explicit KiviRunning(const T* queries) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      const uint2 four =
          *reinterpret_cast<const uint2*>(queries + lane / 4 * PartOf<kSize>::kQuery + 16 * k + 4 * (lane % 4));
      query[k][0] = four.x, query[k][1] = four.y;
    }
  }

  template <int kBits>
  __device__ void CodedProducts(const CodeTiles<T, kSize>& tiles, int tile, float (&scores)[8][4]) const {
    const uint32_t group = tiles.IsSecond(tile) ? kHighHalves : kLowHalves;
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      uint32_t codes[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) codes[i] = tiles.template KeyCodes<kBits>(k, i);
      const uint4 steps = tiles.KeySteps(k), lowest = tiles.KeyLowest(k);
      const uint32_t step[2] = {__byte_perm(steps.x, steps.y, group), __byte_perm(steps.z, steps.w, group)};
      const uint32_t least[2] = {__byte_perm(lowest.x, lowest.y, group), __byte_perm(lowest.z, lowest.w, group)};
      // Rows of the other eight heads, of which there are none.
      const uint32_t a[4] = {query[k][0], 0, query[k][1], 0};
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        MultiplyAdd<T>(scores[j], a, Decoded<T, kBits>(Paired<kBits>(codes[0], codes[1], j), step[0], least[0]),
                       Decoded<T, kBits>(Paired<kBits>(codes[2], codes[3], j), step[1], least[1]));
      }
    }
  }

  // Of keys in the ring, or of the new one.
  __device__ void ExactProducts(const AttentionStep& step, const Held& held, int64_t pair, const T* new_key, int tile,
                                float (&scores)[8][4]) const {
    const int lane = threadIdx.x % 32, first = tile * kTokens + lane / 4 * 8;
    const T* const ring = static_cast<const T*>(step.keys) + pair * step.slots * kSize + 4 * (lane % 4);
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const int token = first + j;
      const T* const from =
          token < held.own ? ring + token % step.slots * kSize : new_key + 4 * (lane % 4);
#pragma unroll
      for (int k = 0; k < kSteps; ++k) {
        const uint2 four = *reinterpret_cast<const uint2*>(from + 16 * k);
        const uint32_t a[4] = {query[k][0], 0, query[k][1], 0};
        MultiplyAdd<T>(scores[j], a, four.x, four.y);
      }
    }
  }

  // Turns products into weights, and fades what was mixed before.
  __device__ void Weigh(const AttentionStep& step, const Held& held, int tile, float (&scores)[8][4]) {
    const int lane = threadIdx.x % 32, first = tile * kTokens + lane % 4 * 16;
    float most = highest;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float& score = scores[i % 8][i / 8];
      score = step.softcap > 0 ? step.softcap * kLog2e * tanhf(step.scale * score / step.softcap)
                               : score * step.scale * kLog2e;
      score = held.Sees(first + i) ? score : kNothing;
      most = fmaxf(most, score);
    }
    most = fmaxf(most, __shfl_xor_sync(kAll, most, 1));
    most = fmaxf(most, __shfl_xor_sync(kAll, most, 2));
    const float fade = Power(highest - most);
    highest = most;
    total *= fade;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float& score = scores[i % 8][i / 8];
      score = score == kNothing ? 0 : Power(score - most);
      total += score;
    }
    const float fades[2] = {__shfl_sync(kAll, fade, 8 * (lane % 4)), __shfl_sync(kAll, fade, 8 * (lane % 4) + 4)};
#pragma unroll
    for (int t = 0; t < kSteps; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) mixed[t][i] *= fades[i % 2];
    }
  }

  // Of the values before `coded`.
  template <int kBits>
  __device__ void MixCodes(const CodeTiles<T, kSize>& tiles, int tile, int coded, const float (&weights)[8][4]) {
    const int first = tile * kTokens + threadIdx.x % 4 * 16;
#pragma unroll
    for (int i = 0; i < 16; i += 4) {
      uint32_t codes[4][Of::kLane / 8], steps[2], lowest[2];
#pragma unroll
      for (int t = 0; t < 4; ++t) tiles.template ValueCodes<kBits>(i + t, codes[t]);
#pragma unroll
      for (int half = 0; half < 2; ++half) tiles.ValueFactors(i + 2 * half, steps[half], lowest[half]);
      const FourWeights four(weights, i, [&](int t) { return first + t < coded; });
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
        four.AddTo(mixed[c], values);
      }
    }
  }

  // Of those from `coded` on, which are in the ring or new.
  __device__ void MixExact(const AttentionStep& step, const Held& held, int64_t pair, const T* new_value, int tile,
                           const float (&weights)[8][4]) {
    const int lane = threadIdx.x % 32, first = tile * kTokens + lane % 4 * 16;
    const T* const ring = static_cast<const T*>(step.values) + pair * step.slots * kSize + lane / 4 * Of::kLane;
#pragma unroll
    for (int i = 0; i < 16; i += 4) {
      uint32_t words[4][Of::kLane / 2];
#pragma unroll
      for (int t = 0; t < 4; ++t) {
        const int token = first + i + t;
        // Others have no weight.
        const T* const from = token >= held.coded && token < held.own ? ring + token % step.slots * kSize
                                                                      : new_value + lane / 4 * Of::kLane;
#pragma unroll
        for (int w = 0; w < Of::kLane / 8; ++w) {
          const uint4 eight = reinterpret_cast<const uint4*>(from)[w];
          words[t][4 * w] = eight.x, words[t][4 * w + 1] = eight.y;
          words[t][4 * w + 2] = eight.z, words[t][4 * w + 3] = eight.w;
        }
      }
      const FourWeights four(weights, i, [&](int t) { return first + t >= held.coded; });
#pragma unroll
      for (int c = 0; c < kSteps; ++c) {
        uint32_t values[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          values[n] = __byte_perm(words[n / 2 * 2][c], words[n / 2 * 2 + 1][c], n % 2 == 0 ? kLowHalves : kHighHalves);
        }
        four.AddTo(mixed[c], values);
      }
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

 private:
  // The weights of tokens i to i + 3 that count, the two parts of each.
  struct FourWeights {
    Split<T> first, second;

    template <typename Counts>
    __device__ FourWeights(const float (&weights)[8][4], int i, const Counts& counts)
        : first(Weight(weights, i, counts), Weight(weights, i + 1, counts)),
          second(Weight(weights, i + 2, counts), Weight(weights, i + 3, counts)) {}

    // Of two channels in four tokens: the first two tokens of both, then the last two.
    __device__ void AddTo(float (&mixed)[4], const uint32_t (&values)[4]) const {
      MultiplyAdd<T>(mixed, values, first.high, second.high);
      MultiplyAdd<T>(mixed, values, first.low, second.low);
    }
    template <typename Counts>
    static __device__ float Weight(const float (&weights)[8][4], int i, const Counts& counts) {
      return counts(i) ? weights[i % 8][i / 8] : 0;
    }
  };
};

}  // namespace
}  // namespace any4
