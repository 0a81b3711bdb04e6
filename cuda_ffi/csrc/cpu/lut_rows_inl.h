// What a kernel reads for a row of the weight besides its codes, and how it writes results; see lut_kernel_inl.h.

#include "numbers_inl.h"

// The tables, scales and offsets of a few rows as floats. They are widened together, since a single row's are too few
// for vectors. Tables of fewer than 16 entries are repeated up to 16, so that the bits above an index don't matter.
template <int kBits>
struct Rows {
  static constexpr int64_t kSize = 1 << kBits;
  float* tables;
  float* scales;
  float* offsets;
  int64_t groups;
  bool shared_table_loaded = false;

  Rows(const Weight& w, const Input& in, float* scratch)
      : tables(scratch),
        scales(scratch + kTableRows * kTableFloats),
        offsets(scales + kTableRows * w.groups() + in.padding),
        groups(w.groups()) {}

  template <bool kTablesAlone = false>
  void Load(const Weight& w, int64_t first, int64_t count) {
    if constexpr (!kTablesAlone) {
      Widen(w.scales, w.scales_type, first * groups, count * groups, scales);
      if (w.offsets != nullptr) Widen(w.offsets, w.offsets_type, first * groups, count * groups, offsets);
    }
    if (w.lut_rows == 1) {
      if (!shared_table_loaded) LoadTables(w, 0, 1);
      shared_table_loaded = true;
    } else {
      LoadTables(w, first, count);
    }
  }

  void LoadTables(const Weight& w, int64_t first, int64_t count) {
    Widen(w.lut, w.lut_type, first * kSize, count * kSize, tables);
    if constexpr (kSize < 16) {
      // Backwards from the last row, so that no table is overwritten before it is copied.
      for (int64_t row = count - 1; row >= 0; --row) {
        for (int64_t i = 15; i >= 0; --i) tables[row * 16 + i] = tables[row * kSize + i % kSize];
      }
    }
  }

  // A copy of row n's scales as they are stored, beyond which vector loads may read.
  const uint16_t* Padded(const Weight& w, int64_t n) const {
    auto* copy = reinterpret_cast<uint16_t*>(scales);
    __builtin_memcpy(copy, static_cast<const uint16_t*>(w.scales) + n * groups, groups * sizeof *copy);
    return copy;
  }

  const float* table(const Weight& w, int64_t row) const {
    return tables + (w.lut_rows == 1 ? 0 : row * (kSize < 16 ? 16 : kSize));
  }
};
