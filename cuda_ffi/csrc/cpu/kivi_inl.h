// Attention of the heads that share a key head over part of a row's tokens; each instruction set's file includes this one.
#pragma once

#include "attention_inl.h"
#include "kivi.h"
#include "kivi_codes_inl.h"
#include "scratch.h"

namespace any4 {
namespace {

static_assert(kAttentionChunk % (kRegister * 16) == 0, "a chunk is whole registers of 2-bit codes");

struct KiviSpace {
  float* queries;  // [shared, size]
  float* scores;   // [shared, kAttentionChunk]; then weights
  float* exact;    // [size], of one token

  KiviSpace(const KiviStep& step, Scratch& scratch)
      : queries(scratch.Take<float>(step.shared() * step.size)),
        scores(scratch.Take<float>(step.shared() * kAttentionChunk)),
        exact(scratch.Take<float>(step.size)) {}
};

inline int64_t KiviBytes(const KiviStep& step) {
  Scratch scratch(nullptr);
  KiviSpace(step, scratch);
  return scratch.used();
}

template <class T>
class PairAttention {
 public:
  PairAttention(const KiviStep& step, int64_t pair, float* found, const KiviSpace& space)
      : step_(step),
        pair_(pair),
        row_(pair / step.groups),
        pitch_(kAttentionSums + step.size),
        found_(found),
        space_(space) {
    Widen(step.queries, step.type, (row_ * step.heads + pair % step.groups * step.shared()) * step.size,
          step.shared() * step.size, space.queries);
    ClearParts(found, step.shared(), step.size);
  }

  // Of the tokens of a chunk from `first` on, those of [begin, end) are seen.
  void Chunk(int64_t first, int64_t begin, int64_t end) {
    const int64_t exact_keys = step_.exact_keys(row_), exact_values = step_.exact_values(row_);
    for (int64_t i = 0; i < step_.shared() * kAttentionChunk; ++i) space_.scores[i] = 0;
    if (begin < exact_keys) {
      const int64_t count = std::min(first + kAttentionChunk, exact_keys) - first;
      step_.key_bits == 4 ? CodedScores<4>(first, count) : CodedScores<2>(first, count);
    }
    for (int64_t t = std::max(begin, exact_keys); t < end; ++t) ExactScore(t, t - first);
    for (int64_t h = 0; h < step_.shared(); ++h) {
      Weigh(space_.scores + h * kAttentionChunk, begin - first, end - first, step_.scale, step_.softcap, step_.size,
            found_ + h * pitch_);
    }
    if (begin < exact_values) {
      const int64_t stop = std::min(end, exact_values);
      step_.value_bits == 4 ? MixCodes<4>(first, begin, stop) : MixCodes<2>(first, begin, stop);
    }
    for (int64_t t = std::max(begin, exact_values); t < end; ++t) MixExact(t, t - first);
  }

 private:
  float* Mixed(int64_t h) const { return found_ + h * pitch_ + kAttentionSums; }

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
      panel.ahead = kAttentionChunk * kBits / 8;
      AddAllProducts<kBits>(panel, step_.size, step_.shared(), space_.queries, step_.size,
                            space_.scores + (from - first), kAttentionChunk);
    }
  }

  const float* Exact(const void* ring, int64_t token) const {
    Widen(ring, step_.type, (pair_ * step_.residual + token % step_.residual) * step_.size, step_.size, space_.exact);
    return space_.exact;
  }

  void ExactScore(int64_t token, int64_t place) {
    const float* const key = Exact(step_.keys, token);
    for (int64_t h = 0; h < step_.shared(); ++h) {
      space_.scores[h * kAttentionChunk + place] = Dot(space_.queries + h * step_.size, key, step_.size);
    }
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
      AddAllProducts<kBits>(panel, end - begin, step_.shared(), space_.scores + (begin - first), kAttentionChunk,
                            Mixed(0) + word * kCodes, pitch_);
    }
  }

  void MixExact(int64_t token, int64_t place) {
    const float* const value = Exact(step_.values, token);
    for (int64_t h = 0; h < step_.shared(); ++h) {
      const float weight = space_.scores[h * kAttentionChunk + place];
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
  begin = std::max(begin, step.first(row) / kAttentionChunk * kAttentionChunk), end = std::min(end, step.own(row) + 1);
  for (int64_t first = begin; first < end; first += kAttentionChunk) {
    attention.Chunk(first, std::max(first, step.first(row)), std::min(first + kAttentionChunk, end));
  }
}

inline void AttendTokens(const KiviStep& step, int64_t pair, int64_t begin, int64_t end, float* found, char* memory) {
  Scratch scratch(memory);
  const KiviSpace space(step, scratch);
  (step.type == Type::kFloat32 ? AttendPart<float> : AttendPart<uint16_t>)(step, pair, begin, end, found, space);
}

constexpr KiviKernel kKernel{KiviBytes, AttendTokens, Combine};

}  // namespace
}  // namespace any4
