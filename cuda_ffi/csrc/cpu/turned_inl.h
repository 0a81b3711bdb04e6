// A coded matrix decoded with its axes exchanged; each instruction set's file includes this one, whose inner loops the
// compiler turns into vectors. What a row reads lies a row of codes apart, often a power of two, where all compete for
// the same few places of the cache. So a tile's rows read each of these lines once, into the scratch.
#pragma once

#include "turned.h"
#include "weight.h"

namespace any4 {
namespace {

// For each chunk of a tile and each column, the chunk's codes in a plane of kWidth bits, as one word.
template <int kWidth>
void Words(const Turned& t, const uint8_t* plane, int64_t begin, int64_t chunks, uint32_t* words) {
  const int64_t stride = PlaneBytes(t.n, kWidth), at = begin * kWidth / 8;
  for (int64_t c = 0; c < t.columns; ++c) {
    const uint8_t* from = plane + c * stride + at;
    for (int64_t j = 0; j < chunks; ++j, from += kWidth) {
      uint32_t word = 0;
      const int64_t left = stride - at - j * kWidth;
      // A copy of a known size is one load.
      if (left >= kWidth) {
        __builtin_memcpy(&word, from, kWidth);
      } else {
        __builtin_memcpy(&word, from, left);
      }
      words[j * t.columns + c] = word;
    }
  }
}

template <int kBits>
void Decode(const Turned& t, int64_t tile, char* scratch) {
  constexpr int kLow = LowBits(kBits), kHigh = HighBits(kBits);
  const int64_t begin = tile * kTurnedRows, left = t.n - begin, runs = t.runs(), columns = t.columns;
  const int64_t chunks = left < kTurnedRows ? (left + kTurnedChunk - 1) / kTurnedChunk : kTurnedRows / kTurnedChunk;
  auto* const lows = reinterpret_cast<uint32_t*>(scratch);
  uint32_t* const highs = lows + chunks * columns;
  auto* const scales = reinterpret_cast<float*>(highs + chunks * columns);
  float* const offsets = scales + chunks * columns;
  Words<kLow>(t, t.low, begin, chunks, lows);
  if constexpr (kHigh > 0) Words<kHigh>(t, t.high, begin, chunks, highs);
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t j = 0; j < chunks; ++j) {
      const int64_t run = c * runs + (begin + j * kTurnedChunk) / t.run;
      scales[j * columns + c] = t.scales[run];
      offsets[j * columns + c] = t.offsets[run];
    }
  }
  const float first = t.first, step = t.step;
  for (int64_t i = 0; i < chunks * kTurnedChunk && i < left; ++i) {
    const int64_t at = i / kTurnedChunk * columns;
    const int r = static_cast<int>(i % kTurnedChunk);
    const uint32_t* __restrict low = lows + at;
    const uint32_t* __restrict high = highs + at;
    const float* __restrict scale = scales + at;
    const float* __restrict offset = offsets + at;
    float* __restrict row = t.to + (begin + i) * columns;
    for (int64_t c = 0; c < columns; ++c) {
      uint32_t code = low[c] >> (r * kLow) & ((1u << kLow) - 1);
      if constexpr (kHigh > 0) code |= (high[c] >> (r * kHigh) & ((1u << kHigh) - 1)) << kLow;
      row[c] = (first + step * static_cast<float>(static_cast<int32_t>(code))) * scale[c] + offset[c];
    }
  }
}

void DecodeTile(const Turned& t, int64_t tile, char* scratch) {
  switch (t.bits) {
    case 2: return Decode<2>(t, tile, scratch);
    case 3: return Decode<3>(t, tile, scratch);
    default: return Decode<4>(t, tile, scratch);
  }
}

constexpr TurnedKernel kKernel = {&DecodeTile};

}  // namespace
}  // namespace any4
