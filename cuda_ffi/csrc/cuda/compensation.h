// The codes of a block of columns in sequence, each compensating the errors of those before it: the inner loop of GPTQ.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace any4 {

constexpr int kMostColumns = 128;

struct CompensationBlock {
  const float* own;      // [columns, rows]
  const float* wanted;   // [columns, rows]
  const float* corner;   // [columns, columns], of which what is above the diagonal counts
  const float* table;    // [rows, levels], ascending
  const float* scales;   // [columns, rows]
  const float* offsets;  // like scales; null: none
  int64_t rows;
  int columns;  // 1 to kMostColumns
  int levels;   // a power of two, 2 to 256
  bool uniform;
};

struct CompensationResult {
  uint8_t* codes;  // [columns, rows]
  float* errors;   // [columns, rows]
};

// The function neither allocates nor waits.
cudaError_t Compensate(const CompensationBlock& block, const CompensationResult& result, cudaStream_t stream);

}  // namespace any4
