// A coded matrix decoded with its axes exchanged; each instruction set's file includes this one, whose inner loops the
// compiler turns into vectors. What a row reads lies a row of codes apart, often a power of two, where all compete for
// the same few places of the cache. So a tile's rows read each of these lines once, into the scratch.
#pragma once

#include "lut_turned.h"
#include "weight.h"

namespace any4 {
namespace {

constexpr int64_t kChunks = kTurnedRows / kTurnedChunk;

// For each chunk of a tile and each column, the chunk's codes in a plane of kWidth bits, as one word.
template <int kWidth>
void Words(const Turned& t, const uint8_t* plane, int64_t begin, int64_t chunks, uint32_t* words) {
  const int64_t stride = PlaneBytes(t.n, kWidth), at = begin * kWidth / 8;
  // Copies of a known size are loads.
  if (stride - at >= kChunks * kWidth) {
    for (int64_t c = 0; c < t.columns; ++c) {
      const uint8_t* from = plane + c * stride + at;
      for (int64_t j = 0; j < kChunks; ++j) {
        uint32_t word = 0;
        __builtin_memcpy(&word, from + j * kWidth, kWidth);
        words[j * t.columns + c] = word;
      }
    }
    return;
  }
  for (int64_t c = 0; c < t.columns; ++c) {
    const uint8_t* from = plane + c * stride + at;
    for (int64_t j = 0; j < chunks; ++j) {
      const int64_t left = stride - at - j * kWidth;
      words[j * t.columns + c] = 0;
      __builtin_memcpy(words + j * t.columns + c, from + j * kWidth, left < kWidth ? left : kWidth);
    }
  }
}

template <int kBits>
void Decode(const Turned& t, int64_t tile, float* to, char* scratch) {
  constexpr int kLow = LowBits(kBits), kHigh = HighBits(kBits);
  const int64_t begin = tile * kTurnedRows, left = t.n - begin, runs = t.runs(), columns = t.columns;
  const int64_t chunks = left < kTurnedRows ? (left + kTurnedChunk - 1) / kTurnedChunk : kChunks;
  auto* const lows = reinterpret_cast<uint32_t*>(scratch);
  uint32_t* const highs = lows + chunks * columns;
  auto* const scales = reinterpret_cast<float*>(highs + chunks * columns);
  float* const offsets = scales + chunks * columns;
  Words<kLow>(t, t.low, begin, chunks, lows);
  if constexpr (kHigh > 0) Words<kHigh>(t, t.high, begin, chunks, highs);
  int64_t run_of[kChunks];
  for (int64_t j = 0; j < chunks; ++j) run_of[j] = (begin + j * kTurnedChunk) / t.run;
  for (int64_t c = 0; c < columns; ++c) {
    for (int64_t j = 0; j < chunks; ++j) {
      scales[j * columns + c] = t.scales[c * runs + run_of[j]];
      offsets[j * columns + c] = t.offsets[c * runs + run_of[j]];
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
    float* __restrict row = to + i * columns;
    for (int64_t c = 0; c < columns; ++c) {
      uint32_t code = low[c] >> (r * kLow) & ((1u << kLow) - 1);
      if constexpr (kHigh > 0) code |= (high[c] >> (r * kHigh) & ((1u << kHigh) - 1)) << kLow;
      row[c] = (first + step * static_cast<float>(static_cast<int32_t>(code))) * scale[c] + offset[c];
    }
  }
}

void DecodeTile(const Turned& t, int64_t tile, float* to, char* scratch) {
  switch (t.bits) {
    case 2: return Decode<2>(t, tile, to, scratch);
    case 3: return Decode<3>(t, tile, to, scratch);
    default: return Decode<4>(t, tile, to, scratch);
  }
}

constexpr TurnedKernel kKernel = {&DecodeTile};

}  // namespace
}  // namespace any4
