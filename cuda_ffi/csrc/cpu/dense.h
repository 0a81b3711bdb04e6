// Attention of one new token a row over a dense cache, which also takes that token's key and value.
//
// A row's tokens are in slots from start[row] on, and the new one's slot, `own`, is start[row] + positions[row]; a slot
// beyond the last stands for the last.
//
// dense_<isa>.cc compiles it (dense_inl.h) for one instruction set; dense_handler.cc shares the slots among threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention.h"

namespace any4 {

// Arrays that are `void` have the element type `type`; pairs are rows times groups.
struct DenseStep {
  const void* queries;       // [rows, heads, size]
  const void* new_keys;      // [rows, groups, size]
  const void* new_values;    // like new_keys
  void* keys;                // [pairs, size, slots]
  void* values;              // [pairs, slots, size]
  const int32_t* positions;  // [rows]; a row sees nothing if it is negative
  const int32_t* start;      // [rows]
  const float* cos;          // [rows, size / 2], or null: queries and new keys aren't rotated
  const float* sin;
  Type type;  // float32 or bf16
  int64_t rows, heads, groups;
  int64_t size;  // a multiple of 16
  int64_t slots;
  float scale, softcap;  // a softcap of 0 is none
  int64_t window;        // 0 is all tokens

  int64_t shared() const { return heads / groups; }
  // The slots [first, own] that the new token of a row sees; own is below first if there are none.
  int64_t own(int64_t row) const {
    return positions[row] < 0 ? -1 : std::min<int64_t>(int64_t{start[row]} + positions[row], slots - 1);
  }
  int64_t first(int64_t row) const {
    return window == 0 ? start[row] : std::max<int64_t>(start[row], own(row) - window + 1);
  }
  // Where the new token of a row goes, seen or not.
  int64_t slot(int64_t row) const {
    return std::clamp<int64_t>(int64_t{start[row]} + positions[row], 0, slots - 1);
  }
};

struct DenseKernel {
  int64_t (*scratch_bytes)(const DenseStep& step);
  // Writes the new key, rotated, and the new value of a pair to the cache.
  void (*append)(const DenseStep& step, int64_t pair);
  // The heads of a pair over those of the slots [begin, end) that are seen, of which there is one; begin is a multiple of
  // kAttentionChunk. found: [shared, kAttentionSums + size]. `scratch` is aligned to 64 bytes.
  void (*attend)(const DenseStep& step, int64_t pair, int64_t begin, int64_t end, float* found, char* scratch);
  CombineParts* combine;
};

// Null if the library was built without that instruction set.
const DenseKernel* PortableDense();
const DenseKernel* Avx2Dense();
const DenseKernel* Avx512Dense();

}  // namespace any4
