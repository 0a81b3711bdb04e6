// What kernels for bytes read of a few rows of the weight besides the codes; see byte_kernel_inl.h.

// Whether tables are stored as they are looked up.
inline bool HasTables(const Weight& w) { return w.integers && w.bits == 4; }

// The table of a row for codes of at most 4 bits; a ramp's counts from minus half its size.
inline void LoadTable(const Weight& w, int64_t row, int8_t (&table)[16]) {
  const int64_t size = int64_t{1} << w.bits;
  const int8_t* const stored = static_cast<const int8_t*>(w.lut) + (w.lut_rows == 1 ? 0 : row) * size;
  if (HasTables(w)) {
    __builtin_memcpy(table, stored, 16);
  } else if (!w.integers) {
    for (int64_t i = 0; i < 16; ++i) table[i] = static_cast<int8_t>(i - size / 2);
  } else {
    for (int64_t i = 0; i < size; ++i) table[i] = stored[i];
  }
}

// The tables, and the scales and offsets as floats; a ramp's step and middle are part of these.
struct ByteRows {
  int8_t tables[kByteRows][16] = {};
  float* scales;
  float* offsets;
  bool any_offsets;

  ByteRows(const Weight& w, float* scratch)
      : scales(scratch),
        offsets(scratch == nullptr ? nullptr : scratch + kByteRows * w.groups() + kBytePadding),
        any_offsets(w.offsets != nullptr) {}

  void Load(const Weight& w, int64_t first, int64_t count) {
    LoadTables(w, first, count);
    LoadScales(w, first, count);
  }

  __attribute__((noinline)) void LoadTables(const Weight& w, int64_t first, int64_t count) {
    if (w.bits > 4) return;
    for (int64_t row = 0; row < count; ++row) LoadTable(w, first + row, tables[row]);
  }

  __attribute__((noinline)) void LoadScales(const Weight& w, int64_t first, int64_t count) {
    const int64_t groups = w.groups(), size = int64_t{1} << w.bits;
    Widen(w.scales, w.scales_type, first * groups, count * groups, scales);
    any_offsets = w.offsets != nullptr;
    if (any_offsets) Widen(w.offsets, w.offsets_type, first * groups, count * groups, offsets);
    for (int64_t row = 0; row < count && !w.integers; ++row) {
      const int64_t table = (w.lut_rows == 1 ? 0 : first + row) * size;
      float start[2], middle;
      Widen(w.lut, w.lut_type, table, 2, start);
      Widen(w.lut, w.lut_type, table + size / 2, 1, &middle);
      const float step = start[1] - start[0];
      if (middle != 0 && !any_offsets) {
        for (int64_t i = 0; i < count * groups; ++i) offsets[i] = 0;
        any_offsets = true;
      }
      for (int64_t i = row * groups; i < (row + 1) * groups; ++i) {
        if (any_offsets) offsets[i] += middle * scales[i];
        scales[i] *= step;
      }
    }
  }
};

// y[row] += the products of the groups' offsets with sums of x over the groups.
template <class V>
inline typename V::Floats AddOffsets(typename V::Floats sum, const float* offsets, const float* of_x, int64_t groups) {
  for (int64_t g = 0; g < groups; g += V::kLanes) {
    sum = V::Fma(V::LoadFirst(offsets + g, groups - g), V::LoadFirst(of_x + g, groups - g), sum);
  }
  return sum;
}
