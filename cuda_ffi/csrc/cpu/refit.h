// The refit of table-coded rows: codes, table, scales and offsets in turn, each in its stored dtype and each for a lower
// error sum_k h_k (w_k - table[c_k] s_g(k) - o_g(k))^2.
//
// refit_<isa>.cc compiles it, refit_*_inl.h, for one instruction set; refit_handler.cc shares out the rows.
#pragma once

#include <cstdint>

namespace any4 {

constexpr int64_t kMaxEntries = 16;

struct RefitOptions {
  int64_t inputs;       // of a row, K
  int64_t group_size;   // 1 to K
  int64_t entries;      // of a table, 2 to kMaxEntries
  int64_t first, stop;  // those that may change
  int64_t searches;     // rounds that begin with a search for each group's scale
  int64_t max_rounds;
  float settled;  // the share of its error that a row must lose in a round to get another
  // A search tries `starts` starts, and fits as often after each: the scale times factors[i], with the point held[i] of
  // the table's range where it is (0 its lower end, 1 its upper; without offsets zero is).
  const float *factors, *held;
  int64_t starts, fits;
  // Bits of mantissa of the stored dtypes: 23 float32, 10 float16, 7 bfloat16.
  int64_t table_mantissa, scale_mantissa, offset_mantissa;

  int64_t groups() const { return (inputs + group_size - 1) / group_size; }
};

struct RefitRows {
  int64_t count;
  const float* weights;     // [count, inputs]
  const float* importance;  // [inputs], not negative
  // What is refitted, in place: [count, entries], ascending; [count, groups]; the same or null.
  float* tables;
  float* scales;
  float* offsets;
};

struct RefitKernel {
  // Bytes of scratch for rows of this form.
  int64_t (*scratch_bytes)(const RefitOptions& options);
  // `scratch` is aligned to 64 bytes. Rows with NaN or infinite values stay as they are.
  void (*refit)(const RefitRows& rows, const RefitOptions& options, char* scratch);
};

// Null where the library was built without them.
const RefitKernel* PortableRefit();
const RefitKernel* Avx2Refit();
const RefitKernel* Avx512Refit();

}  // namespace any4
