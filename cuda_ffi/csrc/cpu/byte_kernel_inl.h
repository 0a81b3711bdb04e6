// The kernel, over a vector type V. Each instruction set's file includes this one inside its own namespace, so that the
// linker never merges code of different sets. For the same reason it calls nothing of the standard library.
//
// Of V the kernel needs kLanes lanes of 32 bits in Ints and Floats, Bytes of 4 kLanes, and
//   kUnsigned                  whether weights are value + 128, bytes without a sign, else bytes with one
//   kHoldsLowest               whether a weight may be -128
//   kRowsOfOne                 rows of the weight at a time for one row of x, where latency limits
//   kRows, kInputs             those of the weight and of x at a time, where there are more of x
//   Dot(sum, weights, q)       adds to each lane the products of its 4 bytes
//   Table, Low, High           a table of 16 bytes, and the halves of a vector of codes that it looks up
//   Whole(at, low, high)       two vectors of codes of 8 bits in the order of byte_kernel.h

#include "numbers_inl.h"
#include "byte_round_inl.h"

// The bytes of row n's table, -8 to 7 for a ramp.
inline const int8_t* TableOf(const ByteWeight& w, int64_t n) {
  static constexpr int8_t kRamp[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
  return w.ramp ? kRamp : static_cast<const int8_t*>(w.lut) + (w.lut_rows == 1 ? 0 : n * 16);
}

// The scales and offsets of a few rows of the weight, as floats; a ramp's step and middle are part of them.
struct ByteRows {
  float* scales;
  float* offsets;
  bool any_offsets;

  ByteRows(const ByteWeight& w, float* scratch)
      : scales(scratch), offsets(scratch + kByteRows * w.groups() + kBytePadding), any_offsets(w.offsets != nullptr) {}

  void Load(const ByteWeight& w, int64_t first, int64_t count) {
    const int64_t groups = w.groups();
    Widen(w.scales, w.scales_type, first * groups, count * groups, scales);
    any_offsets = w.offsets != nullptr;
    if (any_offsets) Widen(w.offsets, w.offsets_type, first * groups, count * groups, offsets);
    if (!w.ramp) return;
    for (int64_t row = 0; row < count; ++row) {
      const int64_t size = int64_t{1} << w.bits, table = (w.lut_rows == 1 ? 0 : first + row) * size;
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

// The codes of kRows neighbouring rows of the weight. Vector loads read whole steps: after a row come the next row's
// bytes, which do no harm, since x has zeros there. After the last row no bytes may be read, so its own are copied.
template <class V, int kBits, int kRows>
struct ByteCodes {
  static constexpr int64_t kStepBytes = V::kLanes * kBits;
  // Codes are prefetched a page ahead, since the processor's own prefetching ends there.
  static constexpr int64_t kAhead = 4096;

  const uint8_t* rows[kRows];
  const uint8_t* ends[kRows];
  uint8_t last[kRows][kStepBytes];

  ByteCodes(const ByteWeight& w, int64_t n, int64_t steps) {
    const int64_t stride = CodeBytes(w.k, kBits), whole = (steps - 1) * kStepBytes;
    for (int r = 0; r < kRows; ++r) {
      rows[r] = w.codes + (n + r) * stride;
      ends[r] = rows[r] + whole;
      if ((w.n - n - r) * stride - whole >= kStepBytes) continue;
      __builtin_memset(last[r], 0, kStepBytes);
      __builtin_memcpy(last[r], ends[r], stride - whole);
      ends[r] = last[r];
    }
  }
};

template <class V, int kBits, int kRows, int kInputs, bool kWhole>
struct ByteTile {
  using Bytes = typename V::Bytes;
  using Ints = typename V::Ints;
  using Floats = typename V::Floats;
  static constexpr int64_t kLanes = V::kLanes;

  const ByteInput& in;
  int64_t input;  // the first row of x
  typename V::Table tables[kRows];
  const float* scales[kRows];
  Floats sums[kRows][kInputs];

  inline __attribute__((always_inline)) void Step(int64_t step, const uint8_t* const* codes) {
    const int8_t* values = in.values + (input * in.steps + step) * 8 * kLanes;
    const int32_t* starts = in.starts + (input * in.steps + step) * kLanes;
    const float* input_scales = in.scales + (input * in.steps + step) * kLanes;
    Bytes low[kRows], high[kRows];
    Floats scale[kRows];
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kBits == 4) {
        const Bytes both = V::Load(codes[r]);
        low[r] = tables[r].Look(V::Low(both));
        high[r] = tables[r].Look(V::High(both));
      } else {
        V::Whole(codes[r], &low[r], &high[r]);
      }
      const float* from = scales[r] + in.group[step];
      scale[r] = kWhole ? V::Broadcast(*from) : V::Pick(from, in.relative + step * kLanes);
    }
    for (int i = 0; i < kInputs; ++i) {
      const Bytes q_low = V::Load(values + i * in.steps * 8 * kLanes);
      const Bytes q_high = V::Load(values + i * in.steps * 8 * kLanes + 4 * kLanes);
      const Floats by = V::LoadFloats(input_scales + i * in.steps * kLanes);
      const Ints start = V::kUnsigned ? V::LoadInts(starts + i * in.steps * kLanes) : V::Zero();
      for (int r = 0; r < kRows; ++r) {
        const Ints dot = V::Dot(V::Dot(start, low[r], q_low), high[r], q_high);
        sums[r][i] = V::Fma(V::ToFloats(dot), V::Multiply(by, scale[r]), sums[r][i]);
      }
    }
  }

  inline __attribute__((always_inline)) void Run(ByteCodes<V, kBits, kRows>& codes) {
    for (auto& of_row : sums) {
      for (Floats& sum : of_row) sum = V::ZeroFloats();
    }
    for (int64_t step = 0; step + 1 < in.steps; ++step) {
      const uint8_t* at[kRows];
      for (int r = 0; r < kRows; ++r) {
        at[r] = codes.rows[r] + step * codes.kStepBytes;
        if (kInputs == 1) __builtin_prefetch(at[r] + codes.kAhead);
      }
      Step(step, at);
    }
    Step(in.steps - 1, codes.ends);
  }
};

template <class V, int kBits, bool kWhole>
struct ByteMultiply {
  template <int kRows, int kInputs>
  static void Tile(const ByteWeight& w, const ByteInput& in, const ByteRows& rows, int64_t n, int64_t within,
                   int64_t input, const Output& out) {
    ByteCodes<V, kBits, kRows> codes(w, n, in.steps);
    ByteTile<V, kBits, kRows, kInputs, kWhole> tile{in, input, {}, {}, {}};
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kBits == 4) tile.tables[r].Set(TableOf(w, n + r));
      tile.scales[r] = rows.scales + (within + r) * in.groups;
    }
    tile.Run(codes);
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < kInputs; ++i) {
        auto sum = tile.sums[r][i];
        if (rows.any_offsets) {
          const float* offsets = rows.offsets + (within + r) * in.groups;
          const float* of_x = in.sums + (input + i) * in.groups;
          for (int64_t g = 0; g < in.groups; g += V::kLanes) {
            sum = V::Fma(V::LoadFirst(offsets + g, in.groups - g), V::LoadFirst(of_x + g, in.groups - g), sum);
          }
        }
        Store(out, input + i, n + r, V::Sum(sum));
      }
    }
  }

  // Rows [first, first + count) of the weight by kInputs rows of x, as many of the weight at a time as registers allow.
  template <int kRows, int kInputs>
  static void Tiles(const ByteWeight& w, const ByteInput& in, const ByteRows& rows, int64_t first, int64_t count,
                    int64_t input, const Output& out) {
    int64_t r = 0;
    for (; r + kRows <= count; r += kRows) Tile<kRows, kInputs>(w, in, rows, first + r, r, input, out);
    for (; r < count; ++r) Tile<1, kInputs>(w, in, rows, first + r, r, input, out);
  }

  static void Range(const ByteWeight& w, const ByteInput& in, int64_t begin, int64_t end, const Output& out,
                    float* scratch) {
    ByteRows rows(w, scratch);
    for (int64_t first = begin; first < end; first += kByteRows) {
      const int64_t count = end - first < kByteRows ? end - first : kByteRows;
      rows.Load(w, first, count);
      int64_t input = 0;
      for (; input + V::kInputs <= in.rows; input += V::kInputs) {
        Tiles<V::kRows, V::kInputs>(w, in, rows, first, count, input, out);
      }
      for (; input + 2 <= in.rows; input += 2) Tiles<V::kRows, 2>(w, in, rows, first, count, input, out);
      if (input < in.rows) Tiles<V::kRowsOfOne, 1>(w, in, rows, first, count, input, out);
    }
  }
};

// V may have another type for codes of 8 bits, and for tables that hold -128.
template <class V, class Wide>
struct ByteKernelOf {
  static void Round(const void* x, Type type, int bits, const ByteInput& in, int64_t row) {
    (bits == 4 ? RoundRow<V, 4> : RoundRow<V, 8>)(x, type, in, row);
  }

  template <bool kWhole>
  static void Chosen(const ByteWeight& w, const ByteInput& in, int64_t begin, int64_t end, const Output& out,
                     float* scratch) {
    if (w.bits == 8) return ByteMultiply<Wide, 8, kWhole>::Range(w, in, begin, end, out, scratch);
    const bool narrow = V::kHoldsLowest || w.ramp || !HoldsLowest(w, begin, end);
    (narrow ? ByteMultiply<V, 4, kWhole>::Range : ByteMultiply<Wide, 4, kWhole>::Range)(w, in, begin, end, out, scratch);
  }

  static bool HoldsLowest(const ByteWeight& w, int64_t begin, int64_t end) {
    const auto* table = static_cast<const int8_t*>(w.lut) + (w.lut_rows == 1 ? 0 : begin * 16);
    int8_t lowest = 127;
    for (int64_t i = 0; i < (w.lut_rows == 1 ? 16 : (end - begin) * 16); ++i) {
      lowest = table[i] < lowest ? table[i] : lowest;
    }
    return lowest == -128;
  }

  static void Multiply(const ByteWeight& w, const ByteInput& in, int64_t begin, int64_t end, const Output& out,
                       float* scratch) {
    (in.whole_steps ? Chosen<true> : Chosen<false>)(w, in, begin, end, out, scratch);
  }

  static const ByteKernel* Get() {
    static const ByteKernel kernel{V::kLanes, Round, Multiply};
    return &kernel;
  }
};
