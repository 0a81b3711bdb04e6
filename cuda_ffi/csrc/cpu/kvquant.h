// Attention of one new token a row over a KVQuant cache that holds it already.
//
// A row's tokens are counted from 0, and the new one's number, `own`, is positions[row]. The first `sinks` tokens are
// exact, and so are those from own - recent + 1 on, token t at place t mod recent of a ring. Others are codes: of a key's
// channel for offset + scale * level, which are the channel's; of a value for the same with those of its token. A token has
// slots for outliers, exact numbers of any of its groups * size channels. Keys are stored before their rotation.
//
// kvquant_<isa>.cc compiles it (kvquant_inl.h) for one instruction set; kvquant_handler.cc shares the tokens among threads.
#pragma once

#include <algorithm>
#include <cstdint>

#include "attention.h"

namespace any4 {

// Tokens [rows, room]. Arrays that are `void` have the element type of the step, but `channels`.
struct TokenCodes {
  const uint8_t* planes[2];  // [rows, groups, room, size * width / 8]; the second is null unless codes have two
  const void* outliers;      // [rows, room, slots]
  const void* channels;      // likewise, of one or two bytes
  const void* ranges;        // [rows, room, 2], scale and offset; null for keys
  const float* levels;       // [2^bits]
};

struct KVQuantStep {
  const void* queries;  // [rows, heads, size], rotated
  TokenCodes keys, values;
  const float* scales;           // [groups, size], of keys
  const float* offsets;          // likewise
  const void *first_keys, *first_values;    // [rows, groups, sinks, size]
  const void *recent_keys, *recent_values;  // [rows, groups, recent, size]
  const int32_t* positions;      // [rows]; a row has no token if it is negative
  // cos and sin, [kAttentionChunk, size / 2] of the first positions and [chunks, size / 2] of those that begin a chunk, both
  // times an amplitude, cos[0]; null if nothing is rotated. Angles are proportional to positions.
  const float *cos, *sin, *chunk_cos, *chunk_sin;
  Type type;  // float32 or bf16
  int64_t rows, heads, groups;
  int64_t size;  // a multiple of 32 up to kMostChannels
  int64_t room, slots, channel_bytes, sinks, recent;
  int64_t bits;          // 4, 3 or 2
  float scale, softcap;  // a softcap of 0 is none
  int64_t window;        // 0 is all tokens

  int64_t shared() const { return heads / groups; }
  // The tokens [first, own] that the new one of a row sees, and the first that is among the newest.
  int64_t own(int64_t row) const { return positions[row]; }
  int64_t first(int64_t row) const { return window == 0 ? 0 : std::max<int64_t>(own(row) - window + 1, 0); }
  int64_t newest(int64_t row) const { return std::max<int64_t>(own(row) - recent + 1, 0); }
};

struct KVQuantKernel {
  int64_t (*scratch_bytes)(const KVQuantStep& step);
  // As in kivi.h.
  void (*attend)(const KVQuantStep& step, int64_t pair, int64_t begin, int64_t end, float* found, char* scratch);
  CombineParts* combine;
};

// Null if the library was built without that instruction set.
const KVQuantKernel* PortableKVQuant();
const KVQuantKernel* Avx2KVQuant();
const KVQuantKernel* Avx512KVQuant();

}  // namespace any4
