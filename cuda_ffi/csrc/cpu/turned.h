// The values of a coded matrix, turned: scales whose codes lie along the rows that they scale.
//
// turned_<isa>.cc compiles it (turned_inl.h) for one instruction set; turned_handler.cc shares the rows.
#pragma once

#include <cstdint>

namespace any4 {

// Rows of a tile. Runs of codes with one range are of a multiple of kTurnedChunk.
constexpr int64_t kTurnedRows = 64;
constexpr int64_t kTurnedChunk = 8;

// to[i, c] = (first + step * codes[c, i]) * scales[c, i / run] + offsets[c, i / run], for codes of 2 to 4 bits.
struct Turned {
  int64_t n, columns;
  int64_t run;
  int bits;
  const uint8_t* low;   // [columns, plane bytes of n codes]
  const uint8_t* high;  // the second plane of 3 bits
  float first, step;
  const float* scales;  // [columns, runs]
  const float* offsets;
  float* to;  // [n, columns]

  int64_t runs() const { return (n + run - 1) / run; }
  int64_t scratch_bytes() const { return kTurnedRows / kTurnedChunk * 4 * columns * static_cast<int64_t>(sizeof(float)); }
};

struct TurnedKernel {
  // Decodes tile `tile` of the rows; `scratch` is aligned to 64 bytes.
  void (*decode)(const Turned& turned, int64_t tile, char* scratch);
};

// Null if the library was built without that instruction set.
const TurnedKernel* PortableTurned();
const TurnedKernel* Avx2Turned();
const TurnedKernel* Avx512Turned();

}  // namespace any4
