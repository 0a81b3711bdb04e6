// Attention of one new token a row over a KIVI cache, with its key and value put into the cache.
//
// A row's tokens are counted from 0, and the new one's number, `own`, is positions[row]. Keys before own - own mod R are
// codes, in groups of consecutive tokens of one channel; so are values before own - R + 1, in groups of channels of one
// token. The rest is exact: it is in a ring of R tokens, token t at place t mod R, or new. A code stands for
// lowest + step * code, rounded to the dtype of the queries.
#pragma once

#include "attention.h"

namespace any4 {

// T is the element type of all arrays that are `void`; pairs are rows times groups.
struct KiviStep {
  // Its cache, `keys` and `values`, is the rings [pairs, slots, size] with slots = R, a multiple of 64. Its positions are
  // the new tokens'; a row has none if it is negative. At most kHeads query heads share a key head.
  AttentionStep token;
  uint8_t* key_codes;    // [pairs, size, key_positions * key_bits / 8]
  void* key_steps;       // [pairs, size, key_positions / group_size]
  void* key_lowest;      // like key_steps
  uint8_t* value_codes;  // [pairs, value_positions, size * value_bits / 8]
  void* value_steps;     // [pairs, value_positions, size / min(group_size, size)]
  void* value_lowest;    // like value_steps
  int key_bits, value_bits;  // 4 or 2
  int group_size;            // 32, 64 or 128
  int key_positions;         // a multiple of 2 group_size, like value_positions
  int value_positions;
};

// For heads of 64 or 128 channels; see attention.h.
cudaError_t AttendKiviBfloat16(const KiviStep& step, cudaStream_t stream);
cudaError_t AttendKiviFloat16(const KiviStep& step, cudaStream_t stream);

}  // namespace any4
