// The values of a coded matrix, turned: scales whose codes lie along the rows that they scale.
//
// Each instruction set's lut_kernel_<isa>.cc compiles it (lut_turned_inl.h). In lut_product.cc a task gathers what its
// rows have in the lines of each column; then the product decodes it in registers, or it is decoded to memory first.
#pragma once

#include <cstdint>

#include "numbers.h"

namespace any4 {

// Rows of a tile. Runs of codes with one range are of a multiple of kTurnedChunk.
constexpr int64_t kTurnedRows = 128;
constexpr int64_t kTurnedChunk = 8;

// W[i, c] = (first + step * codes[c, i]) * scales[c, i / run] + offsets[c, i / run], for codes of 2 to 4 bits.
struct Turned {
  int64_t n, columns;
  int64_t run;
  int bits;
  const uint8_t* low;   // [columns, plane bytes of n codes]
  const uint8_t* high;  // the second plane of 3 bits
  float first, step;
  Type type;  // of what follows: float32 or bf16
  const void* scales;  // [columns, runs]
  const void* offsets;

  int64_t runs() const { return (n + run - 1) / run; }
};

// Columns that vectors fill, whatever their length.
inline int64_t TurnedColumns(int64_t columns) { return (columns + 15) / 16 * 16; }

// What is gathered of a tile, in [words, TurnedColumns]. A word of `low` has kOfWord rows' codes; one of `high` has the
// highest bits of as many, each two places on.
struct TurnedTile {
  static constexpr int64_t kWords = 16;

  uint8_t* low;
  uint8_t* high;
  float* scales;  // each for `rows` rows
  float* offsets;
  int64_t columns;  // TurnedColumns
  int64_t rows;
  float levels[16];

  TurnedTile(const Turned& of, char* scratch)
      : low(reinterpret_cast<uint8_t*>(scratch)), columns(TurnedColumns(of.columns)), rows(kTurnedChunk) {
    high = low + kWords * columns * 4;
    scales = reinterpret_cast<float*>(high + kWords * columns * 4);
    offsets = scales + kWords * columns;
    for (int i = 0; i < 16; ++i) levels[i] = of.first + of.step * static_cast<float>(i % (1 << of.bits));
  }

  static int64_t Bytes(int64_t columns) { return 4 * kWords * TurnedColumns(columns) * 4; }
};

struct TurnedKernel {
  // Gathers what the rows from `begin` on have, a multiple of kTurnedRows.
  void (*gather)(const Turned& turned, int64_t begin, TurnedTile& tile);
  // Decodes the first `count` of these rows, to [count, columns].
  void (*decode)(const Turned& turned, const TurnedTile& tile, int64_t count, float* to);
};

// Null if the library was built without that instruction set.
const TurnedKernel* PortableTurned();
const TurnedKernel* Avx2Turned();
const TurnedKernel* Avx512Turned();

}  // namespace any4
