// The attention of a warp over its tiles.
#pragma once

#include "attention_part.cuh"

namespace any4 {
namespace {

// 2^x in one instruction. Results below the normal numbers are zero.
__device__ __forceinline__ float Power(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// A warp's softmax so far, over its tiles. Its sums are divided by 2^highest. Lane l has the scores of head l / 4 for
// the slots 2 (l % 4) and 2 (l % 4) + 1 of each eight, and the sums of the heads with these numbers for the channels
// l / 4 and l / 4 + 8 of each sixteen.
template <typename T, int kSize>
struct Running {
  using Of = PartOf<kSize>;

  uint32_t query[Of::kSteps][2];
  float highest = kNothing;  // the highest score, in powers of two
  float total = 0;           // of this lane's slots
  float mixed[Of::kSteps][4] = {};

  __device__ explicit Running(const T* queries) {
    const int lane = threadIdx.x % 32;
    const T* const from = queries + lane / 4 * Of::kQuery + 2 * (lane % 4);
#pragma unroll
    for (int k = 0; k < Of::kSteps; ++k) {
      query[k][0] = *reinterpret_cast<const uint32_t*>(from + 16 * k);
      query[k][1] = *reinterpret_cast<const uint32_t*>(from + 16 * k + 8);
    }
  }

  __device__ void Products(const Tiles<T, kSize>& tiles, float (&scores)[4][4]) const {
    const int number = threadIdx.x % 32 / 8, r = threadIdx.x % 8;
#pragma unroll
    for (int k = 0; k < Of::kSteps; ++k) {
      // Rows of the other eight heads, of which there are none.
      const uint32_t a[4] = {query[k][0], 0, query[k][1], 0};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t keys[4];
        LoadTransposed(tiles.Keys(2 * k + number % 2, r, 2 * half + number / 2), keys);
        MultiplyAdd<T>(scores[2 * half], a, keys[0], keys[1]);
        MultiplyAdd<T>(scores[2 * half + 1], a, keys[2], keys[3]);
      }
    }
  }

  // Turns products into weights, and fades what was mixed before.
  __device__ void Weigh(const AttentionStep& step, const Seen& seen, int tile, float (&scores)[4][4]) {
    const int lane = threadIdx.x % 32;
    if (step.softcap > 0) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        float& score = scores[i / 2][i % 2];
        score = step.softcap * kLog2e * tanhf(step.scale * score / step.softcap);
      }
    } else {
#pragma unroll
      for (int i = 0; i < 8; ++i) scores[i / 2][i % 2] *= step.scale * kLog2e;
    }
    float most = highest;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& score = scores[i / 2][i % 2];
      score = seen.Sees(tile * kTile + i / 2 * 8 + 2 * (lane % 4) + i % 2) ? score : kNothing;
      most = fmaxf(most, score);
    }
    most = fmaxf(most, __shfl_xor_sync(kAll, most, 1));
    most = fmaxf(most, __shfl_xor_sync(kAll, most, 2));
    const float fade = Power(highest - most);
    highest = most;
    total *= fade;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      float& score = scores[i / 2][i % 2];
      score = score == kNothing ? 0 : Power(score - most);
      total += score;
    }
    const float fades[2] = {__shfl_sync(kAll, fade, 8 * (lane % 4)), __shfl_sync(kAll, fade, 8 * (lane % 4) + 4)};
#pragma unroll
    for (int t = 0; t < Of::kSteps; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) mixed[t][i] *= fades[i % 2];
    }
  }

  __device__ void Mix(const Tiles<T, kSize>& tiles, const float (&weights)[4][4]) {
    const int number = threadIdx.x % 32 / 8, r = threadIdx.x % 8;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Split<T> first(weights[2 * half][0], weights[2 * half][1]);
      const Split<T> second(weights[2 * half + 1][0], weights[2 * half + 1][1]);
#pragma unroll
      for (int t = 0; t < Of::kSteps; ++t) {
        uint32_t values[4];
        LoadTransposed(tiles.Values(16 * half + 8 * (number / 2) + r, 2 * t + number % 2), values);
        MultiplyAdd<T>(mixed[t], values, first.high, second.high);
        MultiplyAdd<T>(mixed[t], values, first.low, second.low);
      }
    }
  }

  // Leaves the sums [kHeads, kSize], and in `found` the highest scores and the totals.
  __device__ void Leave(float* sums, float* found) {
    const int lane = threadIdx.x % 32;
    total += __shfl_xor_sync(kAll, total, 1);
    total += __shfl_xor_sync(kAll, total, 2);
    if (lane % 4 == 0) found[lane / 4] = highest, found[kHeads + lane / 4] = total;
#pragma unroll
    for (int t = 0; t < Of::kSteps; ++t) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[(2 * (lane % 4) + i % 2) * kSize + 16 * t + lane / 4 + i / 2 * 8] = mixed[t][i];
      }
    }
  }
};

}  // namespace
}  // namespace any4
