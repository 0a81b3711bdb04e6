// Attention of new tokens of each row over a dense cache, which also takes their keys and values.
//
// A row's tokens are in slots from start[row] on, and a new one's slot, `own`, is start[row] + its position; a slot beyond
// the last stands for the last. New tokens follow one another. They attend in blocks, so that each reads the cache once for
// several tokens.
//
// dense_<isa>.cc compiles it (dense_inl.h) for one instruction set; dense_handler.cc shares the slots among threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention.h"

namespace any4 {

// New tokens of a block.
constexpr int64_t kBlockTokens = 8;

// Arrays that are `void` have the element type `type`; pairs are rows times groups.
struct DenseStep {
  const void* queries;       // [rows, tokens, heads, size]
  const void* new_keys;      // [rows, tokens, groups, size]
  const void* new_values;    // like new_keys
  void* keys;                // [pairs, size, slots]
  void* values;              // [pairs, slots, size]
  const int32_t* positions;  // [rows, tokens]; a token sees nothing if it is negative
  const int32_t* start;      // [rows]
  const float* cos;          // [rows, tokens, size / 2], or null: queries and new keys aren't rotated
  const float* sin;
  Type type;  // float32 or bf16
  int64_t rows, tokens, heads, groups;
  int64_t size;  // a multiple of 16
  int64_t slots;
  float scale, softcap;  // a softcap of 0 is none
  int64_t window;        // 0 is all tokens

  int64_t shared() const { return heads / groups; }
  int64_t blocks() const { return (tokens + kBlockTokens - 1) / kBlockTokens; }
  // Heads of a block's tokens that share a key head.
  int64_t block_heads() const { return std::min(tokens, kBlockTokens) * shared(); }
  // The slots [first, own] that a token sees, which is one of rows times tokens; own is below first if there are none.
  int64_t own(int64_t token) const {
    return positions[token] < 0 ? -1 : std::min<int64_t>(int64_t{start[token / tokens]} + positions[token], slots - 1);
  }
  int64_t first(int64_t token) const {
    const int64_t of_row = start[token / tokens];
    return window == 0 ? of_row : std::max<int64_t>(of_row, own(token) - window + 1);
  }
  // Where a new token goes, seen or not.
  int64_t slot(int64_t token) const {
    return std::clamp<int64_t>(int64_t{start[token / tokens]} + positions[token], 0, slots - 1);
  }
};

struct DenseKernel {
  int64_t (*scratch_bytes)(const DenseStep& step);
  // Writes the new keys, rotated, and the new values of a pair to the cache.
  void (*append)(const DenseStep& step, int64_t pair);
  // The heads of a block of a pair's tokens over those of the slots [begin, end) that are seen; begin is a multiple of
  // kAttentionChunk. found: [tokens of the block, shared, kAttentionSums + size]. `scratch` is aligned to 64 bytes.
  void (*attend)(const DenseStep& step, int64_t pair, int64_t block, int64_t begin, int64_t end, float* found,
                 char* scratch);
  CombineParts* combine;
};

// Null if the library was built without that instruction set.
const DenseKernel* PortableDense();
const DenseKernel* Avx2Dense();
const DenseKernel* Avx512Dense();

}  // namespace any4
