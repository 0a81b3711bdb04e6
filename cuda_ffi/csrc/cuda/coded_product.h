// y = x W^T for a W of 3-bit codes in groups of 16, whose scales and offsets are coded too, and a few entries beside
// it: SpQR's weight (arXiv 2306.03078).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "lut_weight.h"
#include "sparse_product.h"

namespace any4 {

constexpr int kCodedGroup = 16;   // inputs of a group
constexpr int kCodedRun = 16;     // rows whose scales share a range
constexpr int kCodedInputs = 128;  // k is a multiple of it
constexpr int64_t kCodedMostInputs = 28672;
constexpr int kCodedRows = 32;     // n is a multiple of it

// S[n, g] = lut[codes[g, n]] * scales[g, n / kCodedRun] + offsets[g, n / kCodedRun], with codes of 3 bits in two planes,
// and the rest in bfloat16; the table is a ramp.
struct CodedScales {
  const uint8_t* low;     // [groups, n / 4]; nullptr: there are none
  const uint8_t* high;    // [groups, n / 8]
  const void* lut;        // [8]
  const void* scales;     // [groups, n / kCodedRun]
  const void* offsets;    // [groups, n / kCodedRun]
};

// W[n, k] = lut[n or 0, codes[n, k]] * S[n, k / kCodedGroup] + O[n, k / kCodedGroup] + entries[n, k].
struct CodedWeight {
  LutWeight codes;  // without scales and offsets
  bool ramp;        // the table is an arithmetic ramp that all rows share
  CodedScales scales, offsets;
  Entries entries;  // without values, none
};

// x is [m, k] and y [m, n], both bfloat16.
cudaError_t CodedProduct(const CodedWeight& weight, const void* x, int64_t m, void* y, cudaStream_t stream);

}  // namespace any4
