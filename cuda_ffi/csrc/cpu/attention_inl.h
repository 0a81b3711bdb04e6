// What the kernels of decode attention share in their inner loops; each instruction set's files include this one.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "attention.h"
#include "exp_inl.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace any4 {
namespace {

#include "numbers_inl.h"

constexpr float kNothing = -std::numeric_limits<float>::infinity();

inline FloatRegister LoadRegister(const float* from) {
  FloatRegister value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

inline void StoreRegister(float* to, const FloatRegister& value) { __builtin_memcpy(to, &value, sizeof value); }

inline float SumOfRegister(const FloatRegister& lanes) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps((__m512)lanes);
#else
  float sums[kRegister];
  StoreRegister(sums, lanes);
  for (int half = kRegister / 2; half > 0; half /= 2) {
    for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
  }
  return sums[0];
#endif
}

// Of two vectors of a multiple of kRegister.
inline float Dot(const float* a, const float* b, int64_t size) {
  FloatRegister sum = {};
  for (int64_t c = 0; c < size; c += kRegister) sum += LoadRegister(a + c) * LoadRegister(b + c);
  return SumOfRegister(sum);
}

inline void ClearParts(float* parts, int64_t count, int64_t size) {
  for (int64_t i = 0; i < count * (kAttentionSums + size); ++i) parts[i] = i % (kAttentionSums + size) == 0 ? kNothing : 0;
}

// Turns a head's products in the places [begin, end) of a chunk, of which there is one, into weights, and all others into
// zeros; fades what the part has so far. A softcap of 0 is none.
inline void Weigh(float* scores, int64_t begin, int64_t end, float scale, float softcap, int64_t size, float* part) {
  for (int64_t i = 0; i < begin; ++i) scores[i] = kNothing;
  for (int64_t i = end; i < kAttentionChunk; ++i) scores[i] = kNothing;
  const float before = part[0];
  float highest = before;
  for (int64_t i = begin; i < end; ++i) {
    scores[i] *= scale;
    if (softcap > 0) scores[i] = softcap * std::tanh(scores[i] / softcap);
    highest = scores[i] > highest ? scores[i] : highest;
  }
  FloatRegister total = {};
  for (int64_t i = 0; i < kAttentionChunk; i += kRegister) {
    const FloatRegister weights = ExpOfNegative(LoadRegister(scores + i) - highest);
    StoreRegister(scores + i, weights);
    total += weights;
  }
  const float fade = before == kNothing ? 0 : std::exp(before - highest);
  part[0] = highest;
  part[1] = part[1] * fade + SumOfRegister(total);
  for (int64_t c = 0; c < size; ++c) part[kAttentionSums + c] *= fade;
}

inline void Combine(const float* parts, int64_t count, int64_t pitch, int64_t size, int64_t head, const Output& out) {
  float highest = kNothing, total = 0, mixed[kMostChannels] = {};
  for (int64_t i = 0; i < count; ++i) highest = std::max(highest, parts[i * pitch]);
  for (int64_t i = 0; i < count; ++i) {
    const float* const part = parts + i * pitch;
    if (part[0] == kNothing) continue;
    const float share = std::exp(part[0] - highest);
    total += part[1] * share;
    for (int64_t c = 0; c < size; ++c) mixed[c] += part[kAttentionSums + c] * share;
  }
  for (int64_t c = 0; c < size; ++c) Store(out, head, c, total == 0 ? 0 : mixed[c] / total);
}

}  // namespace
}  // namespace any4
