// What the kernels of decode attention share: attention over some of a row's tokens, and how such parts are combined.
#pragma once

#include <cstdint>

#include "numbers.h"

namespace any4 {

// Tokens whose scores are computed at a time; a multiple of what a register of codes holds.
constexpr int64_t kAttentionChunk = 256;

// What attention over some of the tokens gives for one head, followed by `size` sums of weighted values. Both kinds of
// sums are divided by exp(highest).
struct AttentionPart {
  float highest;  // of the scores
  float total;    // of the weights
};

// Floats before the sums of values, and the most channels of a head.
constexpr int64_t kAttentionSums = sizeof(AttentionPart) / sizeof(float), kMostChannels = 256;

// The mixture of a head of `size` channels from `count` parts, `pitch` floats apart, into a row of the results. No parts,
// or such as saw no token, give zeros.
using CombineParts = void(const float* parts, int64_t count, int64_t pitch, int64_t size, int64_t head, const Output& out);

}  // namespace any4
