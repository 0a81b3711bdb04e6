// What lut_product.cc and the code of each instruction set (lut_kernel_*.cc) share.
//
// A word is 32 bits of the first plane of codes, which are CodesPerWord codes. A vector load fills V lanes with a word
// each; these words are a block. Shifting all words by the width of a code brings the block's next V codes into place.
// So lane i of step j holds code i * CodesPerWord + j, and x is stored in that order: block, step, lane. If the group
// size is a multiple of CodesPerWord, all codes of a lane lie in one group, so scales are vectors over lanes too. If at
// most half a block is left at the end of a row, its words have 16 bits and half as many codes, which saves a tenth of
// the work at K = 576.
#pragma once

#include <cstdint>

#include "lut_product.h"
#include "lut_turned.h"

namespace any4 {

constexpr int CodesPerWord(int bits) { return 32 / LowBits(bits); }

// x in the order above, padded with zeros to whole blocks, and all else that the rows of the weight have in common.
struct Input {
  int64_t rows;
  int64_t blocks;           // in a row
  int64_t stride;           // floats in a row of `values`
  const float* values;      // [rows, stride]
  int64_t padding;          // floats that vector loads may read beyond a row's groups
  int64_t sums_stride;      // floats in a row of `sums`
  const float* sums;        // [rows, sums_stride]: x summed over each group, then zeros; null without offsets
  const int32_t* group;     // [blocks]: the group of a block's first lane
  const int32_t* relative;  // [blocks, V]: the group of each lane, less the former
  bool whole_blocks;        // every block lies in one group
  bool whole_lanes;         // every lane does
  bool half;                // the last block has words of 16 bits
};

// How many rows of the weight have their tables widened at a time, and the length of the longest table.
constexpr int64_t kTableRows = 8;
constexpr int64_t kTableFloats = 256;
// How many rows of the weight are decoded at a time if x has many rows.
constexpr int64_t kDecodedRows = 4;
// The rows of x in one pass over the weight: with 8 kB of each, x stays in a level-2 cache of 1 MB or more.
constexpr int64_t kInputRows = 96;
// The floats of a row that are decoded at a time: four rows of them are 32 kB, the size of a level-1 cache. A cache
// line separates decoded rows, as it does rows of x: at distances of a power of two they would all compete for the same
// few places of the cache.
constexpr int64_t kDecodedFloats = 2048;
constexpr int64_t kLineFloats = 16;
constexpr int64_t kDecodedStride = kDecodedFloats + kLineFloats;
// The most rows of the weight in a task.
constexpr int64_t kTaskRows = 64;

// Whether the last block of a row of k codes has words of 16 bits.
constexpr bool EndsInHalf(int bits, int64_t k, int64_t block) {
  return HighBits(bits) == 0 && k % block > 0 && k % block <= block / 2;
}

struct LutKernel {
  int64_t lanes;
  // Both multiply rows [begin, end) of the weight with all rows of the input; `scratch` has ScratchFloats. `few`
  // decodes in registers, which is faster for 1, 2 or 4 rows of x. It takes no other number of rows, and needs
  // whole_lanes.
  void (*few)(const Weight&, const Input&, int64_t begin, int64_t end, const Output&, float* scratch);
  // The weight is a sum of `count` planes, more than one of which only codes of 1 bit may have.
  void (*many)(const Product* planes, int64_t count, const Input&, int64_t begin, int64_t end, const Output&,
               float* scratch);
  // `few` for one row of x and rows [0, end), with the scales, and offsets if there are any, of the tile that begins with
  // these rows, of 3 bits. A group is as many codes as a word has, and the last block isn't half a block. Null for codes
  // of other than 2 and 3 bits.
  void (*few_turned)(const Weight&, const Input&, const TurnedTile& scales, const TurnedTile* offsets, int64_t end,
                     const Output&, float* scratch);
};

// The floats of scratch that a kernel needs: for tables, scales and offsets, decoded rows, and partial sums.
inline int64_t ScratchFloats(const Weight& weight, const Input& input) {
  return kTableRows * (kTableFloats + 2 * weight.groups()) + 2 * input.padding + kDecodedRows * kDecodedStride +
         kTaskRows * kInputRows;
}

// Null if the library was built without that instruction set.
const LutKernel* PortableKernel(int bits);
const LutKernel* Avx2Kernel(int bits);
const LutKernel* Avx512Kernel(int bits);

}  // namespace any4
