// The refit of table-coded rows. Codes, table, scales and offsets in turn, each in its stored dtype, lower the error
// sum_k h_k (w_k - table[c_k] s_g(k) - o_g(k))^2.
//
// refit_<isa>.cc compiles the refit (refit_*_inl.h) for one instruction set; refit_handler.cc shares the rows.
#pragma once

#include <cstdint>

namespace any4 {

constexpr int64_t kMaxEntries = 16;

struct RefitOptions {
  int64_t inputs;       // of a row, K
  int64_t group_size;   // 1 to K
  int64_t entries;      // of a table, 2 to kMaxEntries
  int64_t first, stop;  // the entries that may change
  int64_t searches;     // rounds that begin with a search for each group's scale
  int64_t max_rounds;
  float settled;  // the share of its error that a row must lose in a round to get another round
  // A search tries `starts` starts, each followed by `fits` fits. Start i multiplies the scale by factors[i] and keeps
  // the point held[i] of the table's range where it is: 0 is its lower end, 1 its upper. Without offsets it keeps zero.
  const float *factors, *held;
  int64_t starts, fits;
  // The mantissa bits of the stored dtypes: float32 23, float16 10, bfloat16 7; 0 for a table of int8.
  int64_t table_mantissa, scale_mantissa, offset_mantissa;

  int64_t groups() const { return (inputs + group_size - 1) / group_size; }
};

struct RefitRows {
  int64_t count;
  const float* weights;     // [count, inputs]
  const float* importance;  // [inputs], not negative
  // Refitted in place:
  float* tables;   // [count, entries], ascending
  float* scales;   // [count, groups]
  float* offsets;  // [count, groups], or null
};

struct RefitKernel {
  // The bytes of scratch that rows of this form need.
  int64_t (*scratch_bytes)(const RefitOptions& options);
  // `scratch` is aligned to 64 bytes. Rows with NaN or infinite values stay as they are.
  void (*refit)(const RefitRows& rows, const RefitOptions& options, char* scratch);
};

// Null if the library was built without that instruction set.
const RefitKernel* PortableRefit();
const RefitKernel* Avx2Refit();
const RefitKernel* Avx512Refit();

}  // namespace any4
