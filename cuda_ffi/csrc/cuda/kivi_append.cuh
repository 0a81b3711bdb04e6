// How a new token enters a KIVI cache, and what becomes codes then: the value that leaves its ring, and the keys that
// fill theirs.
#pragma once

#include "kivi_recent.cuh"

namespace any4 {
namespace {

// Codes of numbers from `low` to `high`.
template <typename T>
struct Encoder {
  T step, lowest;
  float wide, low, levels;

  __device__ Encoder(float low, float high, int bits)
      : lowest(static_cast<T>(low)), low(low), levels(static_cast<float>((1 << bits) - 1)) {
    // The smallest normal number: a step below it is zero.
    constexpr float kTiny = std::is_same_v<T, __half> ? 6.103515625e-05f : 1.1754943508222875e-38f;
    step = static_cast<T>(__fdiv_rn(high - low, levels));
    if (static_cast<float>(step) < kTiny) step = static_cast<T>(0.0f);
    wide = static_cast<float>(step);
  }
  __device__ uint32_t Code(float x) const {
    return wide == 0 ? 0 : static_cast<uint32_t>(fminf(fmaxf(rintf(__fdiv_rn(x - low, wide)), 0), levels));
  }
};

template <typename T>
__device__ uint32_t Bits(T x) {
  return *reinterpret_cast<const uint16_t*>(&x);
}

// By one warp: the value that leaves the ring becomes codes, and what these stand for in the warp's tile, if that holds it;
// then the new key and value take its place in the rings.
template <typename T, int kSize>
__device__ void Append(const KiviStep& step, const Held& held, int64_t pair, const T* new_key, const T* new_value,
                       const RecentTiles<T, kSize>* tile) {
  constexpr int kOwn = kSize / 32;  // channels of a lane
  const int lane = threadIdx.x % 32;
  const int64_t place = (pair * step.token.slots + held.own % step.token.slots) * kSize + lane * kOwn;
  T* const keys = static_cast<T*>(step.token.keys) + place;
  T* const values = static_cast<T*>(step.token.values) + place;
  if (held.leaving() >= 0) {
    float x[kOwn], low, high;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      x[i] = static_cast<float>(values[i]);
      low = i == 0 ? x[i] : fminf(low, x[i]), high = i == 0 ? x[i] : fmaxf(high, x[i]);
    }
    const int lanes = min(step.group_size, kSize) / kOwn, groups = 32 / lanes, width = kOwn * step.value_bits;
    for (int other = 1; other < lanes; other *= 2) {
      low = fminf(low, __shfl_xor_sync(kAll, low, other)), high = fmaxf(high, __shfl_xor_sync(kAll, high, other));
    }
    const Encoder<T> encoder(low, high, step.value_bits);
    uint32_t codes[kOwn], word = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) codes[i] = encoder.Code(x[i]), word |= codes[i] << i * step.value_bits;
    if (tile != nullptr) {
      const uint32_t one = __byte_perm(Bits(encoder.step), 0, 0x1010), least = __byte_perm(Bits(encoder.lowest), 0, 0x1010);
      const int channel = lane * kOwn;
      uint32_t* const to =
          reinterpret_cast<uint32_t*>(tile->Value(held.leaving() % kRecent, channel / 8)) + channel % 8 / 2;
#pragma unroll
      for (int i = 0; i < kOwn; i += 2) to[i / 2] = Decoded<T, 4>(codes[i] | codes[i + 1] << 16, one, least);
    }
    const int sharing = 32 / width;  // lanes that share a word
    word <<= lane % sharing * width;
    for (int other = 1; other < sharing; other *= 2) word |= __shfl_xor_sync(kAll, word, other);
    const int64_t at = pair * step.value_positions + held.leaving();
    if (lane % sharing == 0) reinterpret_cast<uint32_t*>(step.value_codes)[at * width + lane / sharing] = word;
    if (lane % lanes == 0) {
      static_cast<T*>(step.value_steps)[at * groups + lane / lanes] = encoder.step;
      static_cast<T*>(step.value_lowest)[at * groups + lane / lanes] = encoder.lowest;
    }
  }
#pragma unroll
  for (int i = 0; i < kOwn; ++i) keys[i] = new_key[lane * kOwn + i], values[i] = new_value[lane * kOwn + i];
}

// By all threads of all parts: where the new key fills up the ring, all keys in it become codes. Nobody reads these in
// this step, and the new key is not read from the ring, to which another part may be writing it.
template <typename T, int kSize>
__device__ void Flush(const KiviStep& step, const Held& held, int64_t pair, const T* new_key) {
  const int slots = step.token.slots, size = step.group_size, bits = step.key_bits;
  if (held.own < 0 || held.own - held.whole != slots - 1 || held.whole + slots > step.key_positions) return;
  const T* const ring = static_cast<const T*>(step.token.keys) + pair * slots * kSize;
  for (int n = blockIdx.x * blockDim.x + threadIdx.x; n < kSize * (slots / size); n += gridDim.x * blockDim.x) {
    const int channel = n % kSize, first = n / kSize * size;
    const auto key = [&](int i) {
      return static_cast<float>(i == slots - 1 ? new_key[channel] : ring[int64_t{i} * kSize + channel]);
    };
    float low = key(first), high = low;
    for (int i = 1; i < size; ++i) low = fminf(low, key(first + i)), high = fmaxf(high, key(first + i));
    const Encoder<T> encoder(low, high, bits);
    const int64_t at = (pair * kSize + channel) * step.key_positions + held.whole + first;
    static_cast<T*>(step.key_steps)[at / size] = encoder.step;
    static_cast<T*>(step.key_lowest)[at / size] = encoder.lowest;
    uint32_t* const to = reinterpret_cast<uint32_t*>(step.key_codes + at / 8 * bits);
    const int each = 32 / bits;
    for (int w = 0; w < size / each; ++w) {
      uint32_t word = 0;
      for (int i = 0; i < each; ++i) word |= encoder.Code(key(first + w * each + i)) << i * bits;
      to[w] = word;
    }
  }
}

}  // namespace
}  // namespace any4
