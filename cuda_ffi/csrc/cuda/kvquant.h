// Attention of one new token a row over a KVQuant cache that holds it already.
//
// A row's tokens are counted from 0, and the new one's number, `own`, is positions[row]. The first `sinks` tokens are
// exact, and so are those from own - recent + 1 on, token t at place t mod recent of a ring. Others are codes: of a
// key's channel for offset + scale * level, which are the channel's; of a value for the same with those of its token.
// Levels, scales and offsets are rounded to the dtype of the queries first, and so is the number. A token has slots for
// outliers, exact numbers of any of its groups * size channels. Keys are stored before their rotation.
#pragma once

#include "attention.h"

namespace any4 {

// Keys that are rotated by their places in a chunk meet queries that are rotated back by where the chunk begins.
constexpr int kTurn = 64;
// The most slots of a token.
constexpr int kMostOutliers = 48;

// T is the element type of all arrays that are `void`, but `channels`.
struct KVQuantCodes {
  const uint8_t* planes[2];  // [rows, groups, room, size * width / 8]; the second is null unless codes have two
  const void* outliers;      // [rows, room, slots]
  const void* channels;      // likewise, of one or two bytes
  const void* ranges;        // [rows, room, 2], scale and offset; null for keys
  const float* levels;       // [2^bits]
};

struct KVQuantStep {
  // Its queries are rotated, and it has no new keys and values, no length, and neither cos nor sin. Its cache, `keys`
  // and `values`, is the rings [rows, groups, recent, size], with slots = recent. A row has no token if its position is
  // negative.
  AttentionStep token;
  KVQuantCodes keys, values;
  const float* scales;                      // [groups, size], of keys
  const float* offsets;                     // likewise
  const void *first_keys, *first_values;    // [rows, groups, sinks, size]
  // cos and sin, [kTurn, size / 2] of the first positions and [turns, size / 2] of those that begin a chunk, both times
  // an amplitude, cos[0]; null if nothing is rotated.
  const float *cos, *sin, *turn_cos, *turn_sin;
  int bits;  // 4, 3 or 2
  int room;  // a multiple of 8
  int slots, channel_bytes, sinks;
};

// For heads of 64 or 128 channels; see attention.h.
cudaError_t AttendKVQuantBfloat16(const KVQuantStep& step, cudaStream_t stream);
cudaError_t AttendKVQuantFloat16(const KVQuantStep& step, cudaStream_t stream);

}  // namespace any4
