// What lut_binary.cc and the code of each instruction set (lut_kernel_*.cc) share: products by tables of signed sums.
//
// The codes of a plane are single bits, so the part of a few inputs in a product is one of few sums +-x0 +-x1 ..., which
// a table holds: entry p adds the inputs whose bits are set in p, and subtracts the others. LUT-GEMM (arXiv 2206.09557)
// has 8 inputs to a table of 256 entries in memory. That is the portable code; vectors take the most inputs whose table
// is one register, 4 with AVX-512 and 3 with AVX2, and one permute looks up a row of the weight in each lane.
//
// A word is the 32 codes of a row that a lane holds. Shifting it by the inputs of a table brings the next index into
// place. Words lie row by row in memory, and are rearranged first so that a load fills the lanes with a word of each row.
#pragma once

#include <cstdint>

#include "lut_product.h"

namespace any4 {

// The codes of a word.
constexpr int64_t kWord = 32;
// The words that are rearranged at a time.
constexpr int64_t kQuad = 4;
// The rows of x in one pass over the weight.
constexpr int64_t kBinaryInputRows = 8;
// The most rows of the weight in a task.
constexpr int64_t kBinaryTaskRows = 256;
// A line of memory beyond arrays, which vector loads may read.
constexpr int64_t kBeyond = 64;

struct BinaryInput {
  int64_t rows;
  int64_t words;         // in a row of codes
  int64_t group_words;   // in a group
  int64_t table_stride;  // floats in a row of `tables`
  const float* tables;   // [rows, table_stride]
  int64_t groups;
  const float* sums;  // [rows, groups]: x summed over each group
};

struct BinaryKernel {
  int64_t rows;         // of the weight, that are multiplied at a time
  int64_t word_floats;  // in the tables of a word
  // The tables of a row of x [words * kWord].
  void (*tables)(const float* x, int64_t words, float* to);
  // The products of all rows of the input with rows [begin, end) of the sum of `count` planes; see BinaryScratchBytes.
  void (*multiply)(const Product* planes, int64_t count, const BinaryInput&, int64_t begin, int64_t end, const Output&,
                   char* scratch);
};

inline int64_t InQuads(int64_t words) { return (words + kQuad - 1) / kQuad * kQuad; }

// For rearranged words; scales, offsets and the shift as they are stored, then rearranged; and sums.
inline int64_t BinaryScratchBytes(const BinaryKernel& kernel, const BinaryInput& input) {
  const int64_t of_row = InQuads(input.words) + 3 * input.groups + 2 * InQuads(input.groups) + kBinaryInputRows;
  return 4 * kernel.rows * of_row + 6 * kBeyond;
}

// Null if the library was built without that instruction set.
const BinaryKernel* PortableBinaryKernel();
const BinaryKernel* Avx2BinaryKernel();
const BinaryKernel* Avx512BinaryKernel();

}  // namespace any4
