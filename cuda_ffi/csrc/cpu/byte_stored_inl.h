// Rows of the weight by rows of x where vectors read scales and offsets as they are stored: at K = 576 a row takes some
// 30 cycles, and to widen its scales into memory first took longer than its products. See byte_kernel_inl.h.
//
// Of V it needs
//   kReadsStored                        true
//   LoadStored(from, type, at, count)   `count` stored numbers from place `at` on as floats, then zeros
//   LoadFirstBytes(from, count)         `count` bytes, then zeros; none are read beyond them
//   PickLanes(floats, lanes)            the floats of these lanes
//   StoreSums(sums, to)                 the sums of the lanes of four vectors

// What a ramp's values are: middle + step * (code less half the codes).
struct Ramp {
  float step, middle;

  __attribute__((noinline)) static Ramp Of(const Weight& w, int64_t n) {
    const int64_t size = int64_t{1} << w.bits, first = (w.lut_rows == 1 ? 0 : n) * size;
    float start[2], middle;
    Widen(w.lut, w.lut_type, first, 2, start);
    Widen(w.lut, w.lut_type, first + size / 2, 1, &middle);
    return {start[1] - start[0], middle};
  }
};

template <class V, int kBits>
struct StoredTile {
  using Bytes = typename V::Bytes;
  using Floats = typename V::Floats;
  static constexpr int64_t kLanes = V::kLanes, kStep = 8 * kLanes, kStepBytes = kLanes * kBits;
  // Codes are prefetched two pages ahead and in order, since the processor's own prefetching ends with a page, and of the
  // few other bytes of a row those of some rows ahead.
  static constexpr int64_t kAhead = 8192, kAheadRows = 64;

  // The products of one step, of whose codes there are `left` bytes; all unless kEnd.
  template <int kRows, int kInputs, bool kEnd>
  static inline __attribute__((always_inline)) void Step(const ByteInput& in, int64_t input, int64_t step, int64_t left,
                                                         const uint8_t* codes, int64_t row_bytes, const uint8_t* ahead,
                                                         const typename V::Table* tables, const Floats* scales,
                                                         Floats (&sums)[kRows][kInputs]) {
    const auto lanes = V::LoadInts(in.relative + step * kLanes);
    Bytes low[kRows], high[kRows];
    Floats scale[kRows];
    for (int r = 0; r < kRows; ++r) {
      const uint8_t* const from = codes + r * row_bytes;
      if constexpr (kBits == 4) {
        const Bytes both = kEnd ? V::LoadFirstBytes(from, left) : V::Load(from);
        low[r] = tables[r].Look(V::Low(both));
        high[r] = tables[r].Look(V::High(both));
      } else {
        const int64_t after = left > 4 * kLanes ? left - 4 * kLanes : 0;
        const Bytes first = kEnd ? V::LoadFirstBytes(from, left) : V::Load(from);
        const Bytes second = kEnd ? V::LoadFirstBytes(from + 4 * kLanes, after) : V::Load(from + 4 * kLanes);
        V::Whole(first, second, &low[r], &high[r]);
      }
      for (int64_t line = 0; line < kStepBytes; line += 64) __builtin_prefetch(ahead + r * kStepBytes + line);
      scale[r] = V::PickLanes(scales[r], lanes);
    }
    for (int i = 0; i < kInputs; ++i) {
      const int64_t at = (input + i) * in.steps + step;
      const Bytes q_low = V::Load(in.values + at * kStep), q_high = V::Load(in.values + at * kStep + kStep / 2);
      const Floats by = V::LoadFloats(in.scales + at * kLanes);
      for (int r = 0; r < kRows; ++r) {
        const auto start = V::kUnsigned ? V::LoadInts(in.starts + at * kLanes) : V::Zero();
        const auto dot = V::Dot(V::Dot(start, low[r], q_low), high[r], q_high);
        sums[r][i] = V::Fma(V::ToFloats(dot), V::Multiply(by, scale[r]), sums[r][i]);
      }
    }
  }

  // Rows n to n + kRows - 1 of the weight by rows input to input + kInputs - 1 of x. At the weight's end no bytes behind
  // a row may be read; elsewhere they are the next row's, and meet zeros of x.
  template <int kRows, int kInputs, bool kEnd>
  static void Multiply(const Weight& w, const ByteInput& in, const uint8_t* codes, int64_t row_bytes,
                       const int8_t* values, int64_t values_stride, int64_t n, int64_t input, const Output& out) {
    const int64_t later = n + kAheadRows;
    __builtin_prefetch(static_cast<const char*>(w.scales) + later * in.groups * 2);
    if (w.offsets != nullptr) __builtin_prefetch(static_cast<const char*>(w.offsets) + later * in.groups * 2);
    if (w.integers) __builtin_prefetch(static_cast<const char*>(w.lut) + later * 16);
    typename V::Table tables[kRows];
    Ramp ramps[kRows];
    Floats sums[kRows][kInputs];
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kBits == 4) tables[r].Set(values + r * values_stride);
      if (!w.integers) ramps[r] = Ramp::Of(w, n + r);
      for (Floats& sum : sums[r]) sum = V::ZeroFloats();
    }
    for (int64_t step = 0; step < in.steps;) {
      // The steps whose scales are in one vector, and the groups that begin before the next such steps.
      const int64_t base = in.group[step], end = in.ends[step];
      const int64_t next = end < in.steps ? in.group[end] : in.groups, count = in.groups - base;
      Floats scales[kRows];
      for (int r = 0; r < kRows; ++r) {
        const int64_t at = (n + r) * in.groups + base;
        scales[r] = V::LoadStored(w.scales, w.scales_type, at, count);
        if (w.offsets != nullptr || !w.integers) {
          Floats offsets = w.offsets != nullptr ? V::LoadStored(w.offsets, w.offsets_type, at, next - base) : V::ZeroFloats();
          if (!w.integers) offsets = V::Fma(V::Broadcast(ramps[r].middle), scales[r], offsets);
          for (int i = 0; i < kInputs; ++i) {
            const float* const of_x = in.sums + (input + i) * in.groups + base;
            sums[r][i] = V::Fma(offsets, V::LoadFirst(of_x, next - base), sums[r][i]);
          }
        }
        if (!w.integers) scales[r] = V::Multiply(V::Broadcast(ramps[r].step), scales[r]);
      }
      for (; step < end; ++step) {
        const int64_t first = step * kStepBytes;
        Step<kRows, kInputs, kEnd>(in, input, step, row_bytes - first, codes + first, row_bytes,
                                   codes + kAhead + kRows * first, tables, scales, sums);
      }
    }
    for (int i = 0; i < kInputs; ++i) {
      Floats of_input[4];
      for (int r = 0; r < 4; ++r) of_input[r] = r < kRows ? sums[r][i] : V::ZeroFloats();
      float totals[4];
      V::StoreSums(of_input, totals);
      for (int r = 0; r < kRows; ++r) Store(out, input + i, n + r, totals[r]);
    }
  }
};
