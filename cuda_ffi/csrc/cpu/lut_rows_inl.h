// What a kernel reads for a row of the weight besides its codes, and how it writes results; see lut_kernel_inl.h.

inline float ToFloat(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline float ToFloat(uint16_t bf16) { return ToFloat(uint32_t{bf16} << 16); }
inline float ToFloat(float value) { return value; }

__attribute__((noinline)) static void Widen(const void* from, Type type, int64_t begin, int64_t count, float* to) {
  if (type == Type::kFloat32) {
    __builtin_memcpy(to, static_cast<const float*>(from) + begin, count * sizeof(float));
  } else if (type == Type::kBfloat16) {
    const uint16_t* source = static_cast<const uint16_t*>(from) + begin;
    for (int64_t i = 0; i < count; ++i) to[i] = ToFloat(uint32_t{source[i]} << 16);
  } else {
    const uint8_t* source = static_cast<const uint8_t*>(from) + begin;
    for (int64_t i = 0; i < count; ++i) to[i] = ToFloat(uint32_t{source[i]} << 23);
  }
}

inline void Store(const Output& out, int64_t row, int64_t column, float value) {
  if (out.type == Type::kFloat32) {
    static_cast<float*>(out.y)[row * out.stride + column] = value;
    return;
  }
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  // Rounds to nearest, ties to even; a NaN keeps its upper half and stays a NaN.
  const bool nan = (bits & 0x7fffffff) > 0x7f800000;
  const uint32_t rounded = nan ? bits | 0x400000 : bits + 0x7fff + ((bits >> 16) & 1);
  static_cast<uint16_t*>(out.y)[row * out.stride + column] = static_cast<uint16_t>(rounded >> 16);
}

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

  Rows(const LutWeight& w, const Input& in, float* scratch)
      : tables(scratch),
        scales(scratch + kTableRows * kTableFloats),
        offsets(scales + kTableRows * w.groups() + in.padding),
        groups(w.groups()) {}

  template <bool kTablesAlone = false>
  void Load(const LutWeight& w, int64_t first, int64_t count) {
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

  void LoadTables(const LutWeight& w, int64_t first, int64_t count) {
    Widen(w.lut, w.lut_type, first * kSize, count * kSize, tables);
    if constexpr (kSize < 16) {
      // Backwards from the last row, so that no table is overwritten before it is copied.
      for (int64_t row = count - 1; row >= 0; --row) {
        for (int64_t i = 15; i >= 0; --i) tables[row * 16 + i] = tables[row * kSize + i % kSize];
      }
    }
  }

  // A copy of row n's scales as they are stored, beyond which vector loads may read.
  const uint16_t* Padded(const LutWeight& w, int64_t n) const {
    auto* copy = reinterpret_cast<uint16_t*>(scales);
    __builtin_memcpy(copy, static_cast<const uint16_t*>(w.scales) + n * groups, groups * sizeof *copy);
    return copy;
  }

  const float* table(const LutWeight& w, int64_t row) const {
    return tables + (w.lut_rows == 1 ? 0 : row * (kSize < 16 ? 16 : kSize));
  }
};
