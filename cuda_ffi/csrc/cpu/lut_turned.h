// The values of a coded matrix, turned: scales whose codes lie along the rows that they scale.
//
// lut_turned_<isa>.cc compiles it (lut_turned_inl.h) for one instruction set; in lut_product.cc a task decodes the
// scales of the rows that it multiplies by.
#pragma once

#include <cstdint>

namespace any4 {

// Rows of a tile. Runs of codes with one range are of a multiple of kTurnedChunk.
constexpr int64_t kTurnedRows = 64;
constexpr int64_t kTurnedChunk = 8;

// W[i, c] = (first + step * codes[c, i]) * scales[c, i / run] + offsets[c, i / run], for codes of 2 to 4 bits.
struct Turned {
  int64_t n, columns;
  int64_t run;
  int bits;
  const uint8_t* low;   // [columns, plane bytes of n codes]
  const uint8_t* high;  // the second plane of 3 bits
  float first, step;
  const float* scales;  // [columns, runs]
  const float* offsets;

  int64_t runs() const { return (n + run - 1) / run; }
};

inline int64_t TurnedScratchBytes(int64_t columns) { return kTurnedRows / kTurnedChunk * 4 * columns * 4; }

struct TurnedKernel {
  // Decodes tile `tile` of the rows, to [kTurnedRows, columns]; `scratch` is aligned to 64 bytes.
  void (*decode)(const Turned& turned, int64_t tile, float* to, char* scratch);
};

// Null if the library was built without that instruction set.
const TurnedKernel* PortableTurned();
const TurnedKernel* Avx2Turned();
const TurnedKernel* Avx512Turned();

}  // namespace any4
