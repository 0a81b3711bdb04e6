// The codes of a block of columns in sequence, each compensating the errors of those before it: the inner loop of GPTQ.
//
// compensation_<isa>.cc compiles it (compensation_inl.h) for one instruction set; compensation_handler.cc shares the
// rows.
#pragma once

#include <cstdint>

namespace any4 {

struct CompensationBlock {
  const float* own;      // [columns, rows]
  const float* wanted;   // [columns, rows]
  const float* corner;   // [columns, columns], of which what is above the diagonal counts
  const float* table;    // [rows, levels], ascending
  const float* scales;   // [columns, rows]
  const float* offsets;  // like scales; null: none
  int64_t rows, columns;
  int64_t levels;  // 2 to 256
  bool uniform;
  // Results:
  uint8_t* codes;  // [columns, rows]
  float* errors;   // [columns, rows]
};

struct CompensationKernel {
  // How many rows make a tile; the last one may have fewer.
  int64_t tile;
  int64_t (*scratch_bytes)(const CompensationBlock& block);
  // Works on tiles [begin, end). `scratch` is aligned to 64 bytes.
  void (*compensate)(const CompensationBlock& block, int64_t begin, int64_t end, char* scratch);
};

// Null if the library was built without that instruction set.
const CompensationKernel* PortableCompensation();
const CompensationKernel* Avx2Compensation();
const CompensationKernel* Avx512Compensation();

}  // namespace any4
