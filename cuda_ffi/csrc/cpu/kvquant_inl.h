// Attention of the heads that share a key head over part of a row's tokens; each instruction set's file includes this one.
//
// Keys of a chunk are rotated by their places in it, and queries back by where the chunk begins.
#pragma once

#include "kvquant.h"
#include "kvquant_codes_inl.h"
#include "scratch.h"

namespace any4 {
namespace {

constexpr int64_t kTogether = 4;  // values that are mixed at a time

struct KVQuantSpace {
  float* queries;  // [shared, size]
  float* turned;   // likewise, rotated back to the beginning of a chunk
  float* scores;   // [shared, kAttentionChunk]; then weights
  float* numbers;  // [kTogether, size], of one token each
  uint8_t* codes;  // [size]

  KVQuantSpace(const KVQuantStep& step, Scratch& scratch)
      : queries(scratch.Take<float>(step.shared() * step.size)),
        turned(scratch.Take<float>(step.shared() * step.size)),
        scores(scratch.Take<float>(step.shared() * kAttentionChunk)),
        numbers(scratch.Take<float>(kTogether * step.size)),
        codes(scratch.Take<uint8_t>(step.size)) {}
};

inline int64_t KVQuantBytes(const KVQuantStep& step) {
  Scratch scratch(nullptr);
  KVQuantSpace(step, scratch);
  return scratch.used();
}

class TokenAttention {
 public:
  TokenAttention(const KVQuantStep& step, int64_t pair, float* found, const KVQuantSpace& space)
      : step_(step),
        pair_(pair),
        row_(pair / step.groups),
        pitch_(kAttentionSums + step.size),
        found_(found),
        space_(space),
        key_levels_(step.keys.levels, int64_t{1} << step.bits),
        value_levels_(step.values.levels, int64_t{1} << step.bits) {
    Widen(step.queries, step.type, (row_ * step.heads + pair % step.groups * step.shared()) * step.size,
          step.shared() * step.size, space.queries);
    ClearParts(found, step.shared(), step.size);
  }

  // Of the tokens of a chunk from `first` on, those of [begin, end) are seen.
  void Chunk(int64_t first, int64_t begin, int64_t end) {
    Turn(first / kAttentionChunk);
    const int64_t size = step_.size, half = size / 2;
    for (int64_t t = begin; t < end; ++t) {
      float* const key = space_.numbers;
      Read(step_.keys, step_.first_keys, step_.recent_keys, t, key);
      if (step_.cos != nullptr) Rotate(key, step_.cos + (t - first) * half, step_.sin + (t - first) * half, size, false);
      for (int64_t h = 0; h < step_.shared(); ++h) {
        space_.scores[h * kAttentionChunk + (t - first)] = Dot(space_.turned + h * size, key, size);
      }
    }
    for (int64_t h = 0; h < step_.shared(); ++h) {
      Weigh(space_.scores + h * kAttentionChunk, begin - first, end - first, step_.scale, step_.softcap, size,
            found_ + h * pitch_);
    }
    for (int64_t t = begin; t < end; t += kTogether) {
      const int64_t count = std::min(kTogether, end - t);
      for (int64_t i = 0; i < count; ++i) {
        Read(step_.values, step_.first_values, step_.recent_values, t + i, space_.numbers + i * size);
      }
      for (int64_t h = 0; h < step_.shared(); ++h) {
        const float* const weights = space_.scores + h * kAttentionChunk + (t - first);
        float* const mixed = found_ + h * pitch_ + kAttentionSums;
        count == kTogether ? Mix<kTogether>(weights, mixed) : MixFew(weights, count, mixed);
      }
    }
  }

 private:
  // Queries for keys that are rotated by their places in a chunk.
  void Turn(int64_t chunk) {
    const int64_t size = step_.size, at = chunk * (size / 2);
    __builtin_memcpy(space_.turned, space_.queries, step_.shared() * size * sizeof(float));
    if (step_.cos == nullptr) return;
    // The amplitude is in the queries and in the keys' factors already.
    const float unit = 1 / step_.cos[0];
    for (int64_t i = 0; i < step_.shared() * size; ++i) space_.turned[i] *= unit;
    for (int64_t h = 0; h < step_.shared(); ++h) {
      Rotate(space_.turned + h * size, step_.chunk_cos + at, step_.chunk_sin + at, size, true);
    }
  }

  void Read(const TokenCodes& tokens, const void* first, const void* recent, int64_t t, float* to) const {
    const int64_t size = step_.size;
    if (t < step_.sinks) {
      Widen(first, step_.type, (pair_ * step_.sinks + t) * size, size, to);
    } else if (t >= step_.newest(row_)) {
      Widen(recent, step_.type, (pair_ * step_.recent + t % step_.recent) * size, size, to);
    } else {
      Decode(tokens, t, to);
    }
  }

  void Decode(const TokenCodes& tokens, int64_t t, float* to) const {
    const int64_t size = step_.size, at = pair_ * step_.room + t, group = pair_ % step_.groups;
    const int64_t bytes = step_.bits == 4 ? size / 2 : size / 4;
    const uint8_t* const high = tokens.planes[1] == nullptr ? nullptr : tokens.planes[1] + at * (size / 8);
    Unpack(step_.bits, tokens.planes[0] + at * bytes, high, size, space_.codes);
    const int64_t token = row_ * step_.room + t;
    if (tokens.ranges == nullptr) {
      const float *const scales = step_.scales + group * size, *const offsets = step_.offsets + group * size;
      for (int64_t c = 0; c < size; c += kRegister) {
        StoreRegister(to + c, key_levels_.At(space_.codes + c) * LoadRegister(scales + c) + LoadRegister(offsets + c));
      }
    } else {
      float range[2];
      Widen(tokens.ranges, step_.type, token * 2, 2, range);
      for (int64_t c = 0; c < size; c += kRegister) {
        StoreRegister(to + c, value_levels_.At(space_.codes + c) * range[0] + range[1]);
      }
    }
    step_.channel_bytes == 1 ? PutOutliers<uint8_t>(tokens, token, to) : PutOutliers<uint16_t>(tokens, token, to);
  }

  // Those that are channels of this pair's head.
  template <class Channel>
  void PutOutliers(const TokenCodes& tokens, int64_t token, float* to) const {
    const Channel* const channels = static_cast<const Channel*>(tokens.channels) + token * step_.slots;
    const uint32_t size = static_cast<uint32_t>(step_.size), first = static_cast<uint32_t>(pair_ % step_.groups) * size;
    for (int64_t i = 0; i < step_.slots; ++i) {
      // Channels before the first are very large numbers.
      const uint32_t channel = channels[i] - first;
      if (channel < size) Widen(tokens.outliers, step_.type, token * step_.slots + i, 1, to + channel);
    }
  }

  // Adds weighted values.
  template <int64_t kCount>
  void Mix(const float* weights, float* mixed) const {
    for (int64_t c = 0; c < step_.size; c += kRegister) {
      FloatRegister sum = LoadRegister(mixed + c);
      for (int64_t i = 0; i < kCount; ++i) sum += weights[i] * LoadRegister(space_.numbers + i * step_.size + c);
      StoreRegister(mixed + c, sum);
    }
  }
  void MixFew(const float* weights, int64_t count, float* mixed) const {
    for (int64_t i = 0; i < count; ++i) {
      for (int64_t c = 0; c < step_.size; ++c) mixed[c] += weights[i] * space_.numbers[i * step_.size + c];
    }
  }

  const KVQuantStep& step_;
  const int64_t pair_, row_, pitch_;
  float* const found_;
  const KVQuantSpace& space_;
  const Levels key_levels_, value_levels_;
};

inline void AttendTokens(const KVQuantStep& step, int64_t pair, int64_t begin, int64_t end, float* found, char* memory) {
  Scratch scratch(memory);
  const KVQuantSpace space(step, scratch);
  const int64_t row = pair / step.groups;
  TokenAttention attention(step, pair, found, space);
  begin = std::max(begin, step.first(row) / kAttentionChunk * kAttentionChunk), end = std::min(end, step.own(row) + 1);
  for (int64_t first = begin; first < end; first += kAttentionChunk) {
    attention.Chunk(first, std::max(first, step.first(row)), std::min(first + kAttentionChunk, end));
  }
}

constexpr KVQuantKernel kKernel{KVQuantBytes, AttendTokens, Combine};

}  // namespace
}  // namespace any4
