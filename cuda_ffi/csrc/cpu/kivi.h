// Attention of one new token a row over a KIVI cache that holds it already.
//
// A row's tokens are counted from 0, and the new one's number, `own`, is positions[row]. Keys before own - own mod R are
// codes, in groups of consecutive tokens of one channel; so are values before own - R + 1, in groups of channels of one
// token. The rest is in rings of R tokens, token t at place t mod R. A code stands for lowest + step * code.
//
// kivi_<isa>.cc compiles it (kivi_inl.h) for one instruction set; kivi_handler.cc shares the tokens among threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention.h"

namespace any4 {

// Arrays that are `void` have the element type `type`; pairs are rows times groups.
struct KiviStep {
  const void* queries;         // [rows, heads, size]
  const void* keys;            // [pairs, residual, size]
  const void* values;          // like keys
  const uint8_t* key_codes;    // [pairs, size, key_positions * key_bits / 8]
  const void* key_steps;       // [pairs, size, key_positions / group_size]
  const void* key_lowest;      // like key_steps
  const uint8_t* value_codes;  // [pairs, value_positions, size * value_bits / 8]
  const void* value_steps;     // [pairs, value_positions, value_groups()]
  const void* value_lowest;    // like value_steps
  const int32_t* positions;    // [rows]; a row has no token if it is negative
  Type type;                   // float32 or bf16
  int64_t rows, heads, groups;
  int64_t size;  // 32, 64, 128 or 256
  int64_t residual;
  int64_t group_size;            // a multiple of 16
  int64_t key_bits, value_bits;  // 4 or 2
  int64_t key_positions, value_positions;  // multiples of 16
  float scale, softcap;  // a softcap of 0 is none
  int64_t window;        // 0 is all tokens

  int64_t shared() const { return heads / groups; }
  int64_t value_groups() const { return std::max<int64_t>(size / group_size, 1); }
  // The tokens [first, own] that the new one of a row sees.
  int64_t own(int64_t row) const { return positions[row]; }
  int64_t first(int64_t row) const { return window == 0 ? 0 : std::max<int64_t>(own(row) - window + 1, 0); }
  // The first exact key and value.
  int64_t exact_keys(int64_t row) const { return own(row) - own(row) % residual; }
  int64_t exact_values(int64_t row) const { return std::max<int64_t>(own(row) - residual + 1, 0); }
};

struct KiviKernel {
  int64_t (*scratch_bytes)(const KiviStep& step);
  // The heads of a pair over those of the tokens [begin, end) that are seen, of which there is one; begin is a multiple of
  // kAttentionChunk. found: [shared, kAttentionSums + size]. `scratch` is aligned to 64 bytes.
  void (*attend)(const KiviStep& step, int64_t pair, int64_t begin, int64_t end, float* found, char* scratch);
  CombineParts* combine;
};

// Null if the library was built without that instruction set.
const KiviKernel* PortableKivi();
const KiviKernel* Avx2Kivi();
const KiviKernel* Avx512Kivi();

}  // namespace any4
