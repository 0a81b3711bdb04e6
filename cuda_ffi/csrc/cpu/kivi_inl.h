// Attention of the heads that share a key head over part of a row's tokens; each instruction set's file includes this one.
#pragma once

#include <cmath>
#include <limits>

#include "exp_inl.h"
#include "kivi.h"
#include "kivi_codes_inl.h"
#include "scratch.h"

namespace any4 {
namespace {

constexpr int64_t kSums = sizeof(KiviPart) / sizeof(float), kMostChannels = 256;
constexpr float kNothing = -std::numeric_limits<float>::infinity();

struct KiviSpace {
  float* queries;  // [shared, size]
  float* scores;   // [shared, kKiviChunk]; then weights
  float* exact;    // [size], of one token

  KiviSpace(const KiviStep& step, Scratch& scratch)
      : queries(scratch.Take<float>(step.shared() * step.size)),
        scores(scratch.Take<float>(step.shared() * kKiviChunk)),
        exact(scratch.Take<float>(step.size)) {}
};

inline int64_t KiviBytes(const KiviStep& step) {
  Scratch scratch(nullptr);
  KiviSpace(step, scratch);
  return scratch.used();
}

inline FloatRegister LoadRegister(const float* from) {
  FloatRegister value;
  __builtin_memcpy(&value, from, sizeof value);
  return value;
}

inline float SumOfRegister(const FloatRegister& lanes) {
  float sum = 0;
  for (int j = 0; j < kRegister; ++j) sum += lanes[j];
  return sum;
}

template <class T>
class PairAttention {
 public:
  PairAttention(const KiviStep& step, int64_t pair, float* found, const KiviSpace& space)
      : step_(step),
        pair_(pair),
        row_(pair / step.groups),
        pitch_(kSums + step.size),
        found_(found),
        space_(space) {
    Widen(step.queries, step.type, (row_ * step.heads + pair % step.groups * step.shared()) * step.size,
          step.shared() * step.size, space.queries);
    for (int64_t h = 0; h < step.shared(); ++h) {
      float* const part = found + h * pitch_;
      part[0] = kNothing;
      for (int64_t i = 1; i < pitch_; ++i) part[i] = 0;
    }
  }

  // Of the tokens of a chunk from `first` on, those of [begin, end) are seen.
  void Chunk(int64_t first, int64_t begin, int64_t end) {
    const int64_t exact_keys = step_.exact_keys(row_), exact_values = step_.exact_values(row_);
    for (int64_t i = 0; i < step_.shared() * kKiviChunk; ++i) space_.scores[i] = 0;
    if (begin < exact_keys) {
      const int64_t count = std::min(first + kKiviChunk, exact_keys) - first;
      step_.key_bits == 4 ? CodedScores<4>(first, count) : CodedScores<2>(first, count);
    }
    for (int64_t t = std::max(begin, exact_keys); t < end; ++t) ExactScore(t, t - first);
    for (int64_t h = 0; h < step_.shared(); ++h) Weigh(h, begin - first, end - first);
    if (begin < exact_values) {
      const int64_t stop = std::min(end, exact_values);
      step_.value_bits == 4 ? MixCodes<4>(first, begin, stop) : MixCodes<2>(first, begin, stop);
    }
    for (int64_t t = std::max(begin, exact_values); t < end; ++t) MixExact(t, t - first);
  }

 private:
  float* Part(int64_t h) const { return found_ + h * pitch_; }
  float* Mixed(int64_t h) const { return Part(h) + kSums; }

  // Rows are channels, columns tokens.
  template <int kBits>
  void CodedScores(int64_t first, int64_t count) {
    constexpr int kCodes = 32 / kBits;
    const int64_t stride = step_.key_positions / kCodes * 4, groups = step_.key_positions / step_.group_size;
    for (int64_t from = first; from < first + count; from += kRegister * kCodes) {
      CodePanel<T> panel{};
      const int64_t group = from / step_.group_size;
      panel.codes = step_.key_codes + pair_ * step_.size * stride + from / kCodes * 4;
      panel.stride = stride;
      panel.words = std::min<int64_t>((step_.key_positions - from) / kCodes, kRegister);
      panel.steps = static_cast<const T*>(step_.key_steps) + pair_ * step_.size * groups + group;
      panel.lowest = static_cast<const T*>(step_.key_lowest) + pair_ * step_.size * groups + group;
      panel.pitch = groups;
      panel.together = 1;
      for (int j = 0; j < kRegister; ++j) {
        panel.group.of[j] = static_cast<int32_t>((from + j * kCodes) / step_.group_size - group);
      }
      panel.groups = panel.group.of[panel.words - 1] + 1;
      panel.ahead = kKiviChunk * kBits / 8;
      AddAllProducts<kBits>(panel, step_.size, step_.shared(), space_.queries, step_.size,
                            space_.scores + (from - first), kKiviChunk);
    }
  }

  const float* Exact(const void* ring, int64_t token) const {
    Widen(ring, step_.type, (pair_ * step_.residual + token % step_.residual) * step_.size, step_.size, space_.exact);
    return space_.exact;
  }

  void ExactScore(int64_t token, int64_t place) {
    const float* const key = Exact(step_.keys, token);
    for (int64_t h = 0; h < step_.shared(); ++h) {
      FloatRegister sum = {};
      for (int64_t c = 0; c < step_.size; c += kRegister) {
        sum += LoadRegister(space_.queries + h * step_.size + c) * LoadRegister(key + c);
      }
      space_.scores[h * kKiviChunk + place] = SumOfRegister(sum);
    }
  }

  // Turns the scores of a head in the places [begin, end) into weights, and all others into zeros.
  void Weigh(int64_t h, int64_t begin, int64_t end) {
    float* const scores = space_.scores + h * kKiviChunk;
    for (int64_t i = 0; i < begin; ++i) scores[i] = kNothing;
    for (int64_t i = end; i < kKiviChunk; ++i) scores[i] = kNothing;
    float highest = Part(h)[0];
    const float before = highest;
    for (int64_t i = begin; i < end; ++i) {
      scores[i] *= step_.scale;
      if (step_.softcap > 0) scores[i] = step_.softcap * std::tanh(scores[i] / step_.softcap);
      highest = scores[i] > highest ? scores[i] : highest;
    }
    FloatRegister total = {};
    for (int64_t i = 0; i < kKiviChunk; i += kRegister) {
      const FloatRegister weights = ExpOfNegative(LoadRegister(scores + i) - highest);
      __builtin_memcpy(scores + i, &weights, sizeof weights);
      total += weights;
    }
    const float fade = before == kNothing ? 0 : std::exp(before - highest);
    Part(h)[0] = highest;
    Part(h)[1] = Part(h)[1] * fade + SumOfRegister(total);
    for (int64_t c = 0; c < step_.size; ++c) Mixed(h)[c] *= fade;
  }

  // Rows are tokens, columns channels.
  template <int kBits>
  void MixCodes(int64_t first, int64_t begin, int64_t end) {
    constexpr int kCodes = 32 / kBits;
    const int64_t words = step_.size / kCodes, groups = step_.value_groups();
    const int64_t at = pair_ * step_.value_positions + begin;
    for (int64_t word = 0; word < words; word += kRegister) {
      CodePanel<T> panel{};
      const int64_t group = std::min(word * kCodes / step_.group_size, groups - 1);
      panel.codes = step_.value_codes + (at * words + word) * 4;
      panel.stride = words * 4;
      panel.words = std::min<int64_t>(words, kRegister);
      panel.steps = static_cast<const T*>(step_.value_steps) + at * groups + group;
      panel.lowest = static_cast<const T*>(step_.value_lowest) + at * groups + group;
      panel.pitch = groups;
      panel.together = static_cast<int>(kRegister / panel.words);
      const auto group_of = [&](int64_t lane) {
        return std::min((word + lane) * kCodes / step_.group_size, groups - 1) - group;
      };
      panel.groups = static_cast<int>(group_of(panel.words - 1)) + 1;
      for (int64_t j = 0; j < kRegister; ++j) {
        panel.row.of[j] = static_cast<int32_t>(j / panel.words);
        panel.group.of[j] = static_cast<int32_t>(j / panel.words * groups + group_of(j % panel.words));
      }
      panel.ahead = 16 * words;
      AddAllProducts<kBits>(panel, end - begin, step_.shared(), space_.scores + (begin - first), kKiviChunk,
                            Mixed(0) + word * kCodes, pitch_);
    }
  }

  void MixExact(int64_t token, int64_t place) {
    const float* const value = Exact(step_.values, token);
    for (int64_t h = 0; h < step_.shared(); ++h) {
      const float weight = space_.scores[h * kKiviChunk + place];
      for (int64_t c = 0; c < step_.size; ++c) Mixed(h)[c] += weight * value[c];
    }
  }

  const KiviStep& step_;
  const int64_t pair_, row_, pitch_;
  float* const found_;
  const KiviSpace& space_;
};

template <class T>
void AttendPart(const KiviStep& step, int64_t pair, int64_t begin, int64_t end, float* found, const KiviSpace& space) {
  const int64_t row = pair / step.groups;
  PairAttention<T> attention(step, pair, found, space);
  begin = std::max(begin, step.first(row) / kKiviChunk * kKiviChunk), end = std::min(end, step.own(row) + 1);
  for (int64_t first = begin; first < end; first += kKiviChunk) {
    attention.Chunk(first, std::max(first, step.first(row)), std::min(first + kKiviChunk, end));
  }
}

inline void AttendTokens(const KiviStep& step, int64_t pair, int64_t begin, int64_t end, float* found, char* memory) {
  Scratch scratch(memory);
  const KiviSpace space(step, scratch);
  (step.type == Type::kFloat32 ? AttendPart<float> : AttendPart<uint16_t>)(step, pair, begin, end, found, space);
}

inline void CombineParts(const KiviStep& step, const float* found, int64_t count, int64_t head, const Output& out) {
  const int64_t own = kSums + step.size, pitch = step.shared() * own;
  float highest = kNothing, total = 0, mixed[kMostChannels] = {};
  for (int64_t i = 0; i < count; ++i) highest = std::max(highest, found[i * pitch]);
  for (int64_t i = 0; i < count; ++i) {
    const float* const part = found + i * pitch;
    if (part[0] == kNothing) continue;
    const float share = std::exp(part[0] - highest);
    total += part[1] * share;
    for (int64_t c = 0; c < step.size; ++c) mixed[c] += part[kSums + c] * share;
  }
  for (int64_t c = 0; c < step.size; ++c) Store(out, head, c, total == 0 ? 0 : mixed[c] / total);
}

constexpr KiviKernel kKernel{KiviBytes, AttendTokens, CombineParts};

}  // namespace
}  // namespace any4
