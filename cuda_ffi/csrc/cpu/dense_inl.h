// Attention of the heads that share a key head over part of a row's slots; each instruction set's file includes this one.
#pragma once

#include "attention_inl.h"
#include "dense.h"
#include "scratch.h"

namespace any4 {
namespace {

struct DenseSpace {
  float* queries;  // [block_heads, size], rotated
  float* scores;   // [block_heads, kAttentionChunk]; then weights

  DenseSpace(const DenseStep& step, Scratch& scratch)
      : queries(scratch.Take<float>(step.block_heads() * step.size)),
        scores(scratch.Take<float>(step.block_heads() * kAttentionChunk)) {}
};

inline int64_t DenseBytes(const DenseStep& step) {
  Scratch scratch(nullptr);
  DenseSpace(step, scratch);
  return scratch.used();
}

inline FloatRegister LoadStored(const float* from) { return LoadRegister(from); }

inline FloatRegister LoadStored(const uint16_t* from) {
  typedef uint16_t Halves __attribute__((vector_size(2 * kRegister)));
  Halves halves;
  __builtin_memcpy(&halves, from, sizeof halves);
  const IntRegister bits = __builtin_convertvector(halves, IntRegister) << 16;
  FloatRegister value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

// Sums of kHeads rows of factors times rows of stored numbers, in the columns of kCount registers: sums[h][c] +=
// sum_i factors[h][i] numbers[i][c].
template <int kHeads, int kCount, class T>
inline __attribute__((always_inline)) void AddTile(const float* factors, int64_t factor_pitch, const T* numbers,
                                                   int64_t pitch, int64_t rows, float* sums, int64_t sum_pitch) {
  FloatRegister sum[kHeads][kCount];
  for (int h = 0; h < kHeads; ++h) {
    for (int r = 0; r < kCount; ++r) sum[h][r] = LoadRegister(sums + h * sum_pitch + r * kRegister);
  }
  for (int64_t i = 0; i < rows; ++i, numbers += pitch) {
    FloatRegister number[kCount];
    for (int r = 0; r < kCount; ++r) number[r] = LoadStored(numbers + r * kRegister);
    for (int h = 0; h < kHeads; ++h) {
      for (int r = 0; r < kCount; ++r) sum[h][r] += factors[h * factor_pitch + i] * number[r];
    }
  }
  for (int h = 0; h < kHeads; ++h) {
    for (int r = 0; r < kCount; ++r) StoreRegister(sums + h * sum_pitch + r * kRegister, sum[h][r]);
  }
}

// The same for any number of columns.
template <int kHeads, class T>
void AddColumns(const float* factors, int64_t factor_pitch, const T* numbers, int64_t pitch, int64_t rows,
                int64_t columns, float* sums, int64_t sum_pitch) {
  // With as many, sums and numbers fill 20 of AVX-512's 32 registers, and 12 of AVX2's 16 for two heads.
  constexpr int kCount = 4;
  int64_t c = 0;
  for (; c + kCount * kRegister <= columns; c += kCount * kRegister) {
    AddTile<kHeads, kCount>(factors, factor_pitch, numbers + c, pitch, rows, sums + c, sum_pitch);
  }
  for (; c + kRegister <= columns; c += kRegister) {
    AddTile<kHeads, 1>(factors, factor_pitch, numbers + c, pitch, rows, sums + c, sum_pitch);
  }
  for (; c < columns; ++c) {
    for (int h = 0; h < kHeads; ++h) {
      for (int64_t i = 0; i < rows; ++i) {
        sums[h * sum_pitch + c] += factors[h * factor_pitch + i] * ToFloat(numbers[i * pitch + c]);
      }
    }
  }
}

// The same for any number of heads.
template <class T>
void AddProducts(int64_t heads, const float* factors, int64_t factor_pitch, const T* numbers, int64_t pitch,
                 int64_t rows, int64_t columns, float* sums, int64_t sum_pitch) {
#ifdef __AVX512F__
  for (; heads >= 4; heads -= 4, factors += 4 * factor_pitch, sums += 4 * sum_pitch) {
    AddColumns<4>(factors, factor_pitch, numbers, pitch, rows, columns, sums, sum_pitch);
  }
  if (heads == 3) return AddColumns<3>(factors, factor_pitch, numbers, pitch, rows, columns, sums, sum_pitch);
#endif
  for (; heads >= 2; heads -= 2, factors += 2 * factor_pitch, sums += 2 * sum_pitch) {
    AddColumns<2>(factors, factor_pitch, numbers, pitch, rows, columns, sums, sum_pitch);
  }
  if (heads == 1) AddColumns<1>(factors, factor_pitch, numbers, pitch, rows, columns, sums, sum_pitch);
}

// Rotates `count` vectors of a token, and rounds them to the step's type.
inline void Rotate(const DenseStep& step, int64_t token, int64_t count, float* vectors) {
  if (step.cos == nullptr) return;
  const int64_t half = step.size / 2;
  const float *const cos = step.cos + token * half, *const sin = step.sin + token * half;
  for (int64_t v = 0; v < count; ++v, vectors += step.size) {
    for (int64_t i = 0; i < half; ++i) {
      const float low = vectors[i], high = vectors[half + i];
      vectors[i] = low * cos[i] - high * sin[i];
      vectors[half + i] = high * cos[i] + low * sin[i];
    }
    if (step.type == Type::kFloat32) continue;
    uint16_t rounded[kMostChannels];
    for (int64_t i = 0; i < step.size; ++i) Store({rounded, 0, step.type}, 0, i, vectors[i]);
    for (int64_t i = 0; i < step.size; ++i) vectors[i] = ToFloat(rounded[i]);
  }
}

inline void AppendTokens(const DenseStep& step, int64_t pair) {
  const int64_t row = pair / step.groups, group = pair % step.groups;
  float fresh[kMostChannels];
  const Output keys{step.keys, step.slots, step.type}, values{step.values, step.size, step.type};
  for (int64_t token = row * step.tokens; token < (row + 1) * step.tokens; ++token) {
    const int64_t slot = step.slot(token), from = (token * step.groups + group) * step.size;
    Widen(step.new_keys, step.type, from, step.size, fresh);
    Rotate(step, token, 1, fresh);
    for (int64_t c = 0; c < step.size; ++c) Store(keys, pair * step.size + c, slot, fresh[c]);
    Widen(step.new_values, step.type, from, step.size, fresh);
    for (int64_t c = 0; c < step.size; ++c) Store(values, pair * step.slots + slot, c, fresh[c]);
  }
}

template <class T>
void AttendPart(const DenseStep& step, int64_t pair, int64_t block, int64_t begin, int64_t end, float* found,
                const DenseSpace& space) {
  const int64_t row = pair / step.groups, shared = step.shared(), size = step.size, pitch = kAttentionSums + size;
  const int64_t oldest = row * step.tokens + block * kBlockTokens;
  const int64_t tokens = std::min(kBlockTokens, step.tokens - block * kBlockTokens), heads = tokens * shared;
  ClearParts(found, heads, size);
  // What the block's tokens see together.
  int64_t first = end, last = begin;
  for (int64_t token = oldest; token < oldest + tokens; ++token) {
    if (step.own(token) < step.first(token)) continue;
    first = std::min(first, step.first(token)), last = std::max(last, step.own(token) + 1);
  }
  begin = std::max(begin, first), end = std::min(end, last);
  if (begin >= end) return;
  for (int64_t t = 0; t < tokens; ++t) {
    float* const queries = space.queries + t * shared * size;
    const int64_t head = (oldest + t) * step.heads + pair % step.groups * shared;
    Widen(step.queries, step.type, head * size, shared * size, queries);
    Rotate(step, oldest + t, shared, queries);
  }
  const T* const keys = static_cast<const T*>(step.keys) + pair * size * step.slots;
  const T* const values = static_cast<const T*>(step.values) + pair * step.slots * size;
  for (int64_t from = begin; from < end; from += kAttentionChunk) {
    const int64_t count = std::min(kAttentionChunk, end - from);
    // Whole registers of scores, where there are so many slots; nothing is made of those beyond.
    const int64_t columns = std::min((count + kRegister - 1) / kRegister * kRegister, step.slots - from);
    for (int64_t h = 0; h < heads; ++h) {
      for (int64_t i = 0; i < columns; ++i) space.scores[h * kAttentionChunk + i] = 0;
    }
    AddProducts(heads, space.queries, size, keys + from, step.slots, size, columns, space.scores, kAttentionChunk);
    for (int64_t h = 0; h < heads; ++h) {
      const int64_t token = oldest + h / shared;
      const int64_t seen = std::max(step.first(token) - from, int64_t{0}), stop = std::min(step.own(token) + 1 - from, count);
      float* const scores = space.scores + h * kAttentionChunk;
      if (seen < stop) {
        Weigh(scores, seen, stop, step.scale, step.softcap, size, found + h * pitch);
      } else {
        for (int64_t i = 0; i < count; ++i) scores[i] = 0;
      }
    }
    AddProducts(heads, space.scores, kAttentionChunk, values + from * size, size, count, size,
                found + kAttentionSums, pitch);
  }
}

inline void AttendSlots(const DenseStep& step, int64_t pair, int64_t block, int64_t begin, int64_t end, float* found,
                        char* memory) {
  Scratch scratch(memory);
  const DenseSpace space(step, scratch);
  (step.type == Type::kFloat32 ? AttendPart<float> : AttendPart<uint16_t>)(step, pair, block, begin, end, found, space);
}

constexpr DenseKernel kKernel{DenseBytes, AppendTokens, AttendSlots, Combine};

}  // namespace
}  // namespace any4
