// What byte_product.cc and the code of each instruction set (byte_kernel_*.cc) share.
//
// A step is the codes of one vector of nibbles, 8 for each of its V lanes of 32 bits. The bytes' low halves are a vector
// of even k, their high halves one of odd k, so x is stored in that order: step, half, byte. Codes of 8 bits fill two
// vectors, and each input group of kGroup is 16 bytes of either, so that both widths leave the sum of a group in the
// same 4 lanes. There every step multiplies by the scales of its groups, and adds to a vector of floats.
#pragma once

#include <cstdint>

#include "byte_product.h"

namespace any4 {

// The width that codes are unpacked to, if it isn't theirs.
constexpr int ByteWidth(int bits) { return bits <= 4 ? 4 : 8; }

// Rounded x in the order above, padded with zeros to whole steps, and all else that the weight's rows have in common.
struct ByteInput {
  int64_t rows;
  int64_t k;
  int64_t group_size;
  int64_t steps;             // in a row
  int8_t* values;            // [rows, steps, 8 V]: q
  int32_t* starts;           // [rows, steps, V]: -128 times the sum of the values that a lane multiplies
  float* scales;             // [rows, steps, V]: a, of each lane
  int32_t* totals;           // [rows, steps, V / 4]: -128 times the sum of the values of a group of kGroup
  float* sums;               // [rows, groups]: of a * q over each of the weight's groups
  int64_t groups;
  const int32_t* group;      // [steps]: the weight's group that a step begins in; see `ends`
  const int32_t* relative;   // [steps, V]: the group of each lane, less the former
  // [steps], for kernels that read scales as they are stored: the end of consecutive steps, this one among them, whose
  // scales are in V places from one on. `group` is then that place, the same for all of them.
  const int32_t* ends;
  bool whole_steps;          // every step lies in one of the weight's groups
};

// How many rows of the weight have their scales widened at a time, and the most of a task.
constexpr int64_t kByteRows = 8;
constexpr int64_t kByteTaskRows = 256;
// The rows of x in one pass over the weight: at K = 2048 they take 256 kB, which a level-2 cache holds.
constexpr int64_t kByteInputRows = 64;
// The least number of rows of x, for kernels that read scales as they are stored, for which a tile of the weight's rows
// is looked up and turned (byte_many_inl.h), and its rows.
constexpr int64_t kManyInputs = 6, kManyRows = 32;
// Floats beyond a row's scales that vector loads may read.
constexpr int64_t kBytePadding = 16;

// x rounded with one scale for each row, in the order of k, but for zeros that fill up each of the weight's groups to
// whole steps, which are vectors of integers.
struct TokenInput {
  int64_t rows;
  int64_t k;
  int64_t group_size;
  int64_t groups;
  int64_t group_steps;  // of a group, and of the last one
  int64_t last_steps;
  int64_t stride;   // integers in a row, which cache lines separate from the next: else powers of two would compete
  int64_t ones;     // the place after all rows of one whose integers are 1; -1 if no row has a zero point
  void* values;     // [places, stride]: q
  int32_t* starts;  // [places, groups, V]: -128 times the sum of the values that a lane multiplies
  float* sums;      // [places, groups]: of q
  float* scales;    // [places]
  float* zeros;     // [places]

  int64_t Steps(int64_t group) const { return group + 1 < groups ? group_steps : last_steps; }
};

// How many rows of the weight are decoded at a time.
constexpr int64_t kTokenRows = 4;

struct ByteKernel {
  int64_t lanes;      // V
  bool reads_stored;  // scales as they are stored
  // Rounds row `row` of x, which is at `x`, into the input's arrays.
  void (*round)(const void* x, Type type, int bits, const ByteInput& in, int64_t row);
  // Multiplies rows [begin, end) of the weight with all rows of the input; `scratch` has ByteScratch.
  void (*multiply)(const Weight&, const ByteInput&, int64_t begin, int64_t end, const Output&, char* scratch);

  // The same with one scale for each row of x: row begin + row of x to the input's place `row`.
  int64_t token_bytes;  // of an integer
  void (*round_token)(const void* x, Type type, const Rounding&, const TokenInput& in, int64_t begin, int64_t row);
  void (*multiply_token)(const Weight&, const TokenInput&, int64_t begin, int64_t end, const Output&, char* scratch);
};

// Bytes of scales and offsets of kByteRows rows.
inline int64_t ByteRowsScratch(const Weight& weight) {
  return 2 * (kByteRows * weight.groups() + kBytePadding) * static_cast<int64_t>(sizeof(float));
}

// Bytes of scratch for `multiply`; see byte_many_inl.h for many rows of x.
inline int64_t ByteScratch(const Weight& weight, const ByteInput& in, const ByteKernel& kernel) {
  const int64_t width = ByteWidth(weight.bits), row = in.steps * kernel.lanes * width;
  const bool many = kernel.reads_stored && in.rows >= kManyInputs;
  const int64_t unpacked = width == weight.bits ? 0 : (many ? kManyRows / 2 : kByteRows) * row;
  const int64_t tile = kManyRows * (in.steps * 8 * kernel.lanes + 2 * weight.groups() * static_cast<int64_t>(sizeof(float)));
  return unpacked + (many ? tile : kernel.reads_stored ? 0 : ByteRowsScratch(weight));
}

// The kernel for an instruction set: the best within it that the library was built with.
const ByteKernel& ByteKernelFor(Isa isa);

// Null if the library was built without that instruction set.
const ByteKernel* PortableByteKernel();
const ByteKernel* DotProdByteKernel();
const ByteKernel* Avx2ByteKernel();
const ByteKernel* AvxVnniByteKernel();
const ByteKernel* Avx512VnniByteKernel();
const ByteKernel* Avx512VbmiByteKernel();

}  // namespace any4
