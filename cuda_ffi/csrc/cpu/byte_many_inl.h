// Many rows of x by a tile of the weight's rows, where vectors read scales as they are stored; see byte_stored_inl.h. The
// tile is looked up once for all rows of x, and turned such that a lane is a row of the weight: a vector holds four
// weights of each, which multiply four inputs in all lanes. So no lanes have to be added up, and scales of x are numbers.
//
// Of V it needs, besides what others do,
//   BroadcastInts(from)          one number, or four bytes, in all lanes
//   Turn(rows), TurnFloats(rows) kLanes vectors of so many lanes, rows to columns
//   StoreFloats(to, value)
//   kManyAtOnce                  rows of x at a time

template <class V, int kBits>
struct ManyMultiply {
  using Bytes = typename V::Bytes;
  using Ints = typename V::Ints;
  using Floats = typename V::Floats;
  static constexpr int64_t kLanes = V::kLanes, kStep = 8 * kLanes, kStepBytes = kLanes * kBits, kRows = 2 * kLanes;
  // A group of kGroup inputs: their words of four weights, in turn of even and odd ones or first and second halves.
  static constexpr int64_t kWords = kGroup / 4, kGroupBytes = kRows * kGroup, kStepGroups = kStep / kGroup;

  struct Tile {
    uint8_t* weights;  // [steps * kStepGroups, kWords, kRows, 4]
    float* scales;     // [groups, kRows]
    float* offsets;    // like scales
  };

  // The weights of kLanes rows, the first of which is at `codes`; where there are but `count`, the last stands for more.
  static void Look(const ByteInput& in, const uint8_t* codes, int64_t stride, const int8_t (&values)[kLanes][16],
                   int64_t count, bool ends, uint8_t* to) {
    typename V::Table tables[kLanes];
    if constexpr (kBits == 4) {
      for (int64_t r = 0; r < kLanes; ++r) tables[r].Set(values[r < count ? r : count - 1]);
    }
    for (int64_t step = 0; step < in.steps; ++step) {
      Bytes low[kLanes], high[kLanes];
      const int64_t left = ends ? stride - step * kStepBytes : kStepBytes;
      for (int64_t r = 0; r < kLanes; ++r) {
        const uint8_t* const from = codes + (r < count ? r : count - 1) * stride + step * kStepBytes;
        // The rows after these, from as many places at once as the processor's own prefetching doesn't follow.
        for (int64_t line = 0; line < kStepBytes; line += 64) __builtin_prefetch(from + kLanes * stride + line);
        const Bytes first = V::LoadFirstBytes(from, left);
        if constexpr (kBits == 4) {
          low[r] = tables[r].Look(V::Low(first));
          high[r] = tables[r].Look(V::High(first));
        } else {
          const int64_t after = left > 4 * kLanes ? left - 4 * kLanes : 0;
          V::Whole(first, V::LoadFirstBytes(from + 4 * kLanes, after), &low[r], &high[r]);
        }
      }
      V::Turn(low);
      V::Turn(high);
      uint8_t* const of_step = to + step * kStepGroups * kGroupBytes;
      for (int64_t word = 0; word < kLanes; ++word) {
        uint8_t* const at = of_step + word / 4 * kGroupBytes + word % 4 * 4 * kRows;
        V::StoreBytes(at, low[word]);
        V::StoreBytes(at + 16 * kRows, high[word]);
      }
    }
  }

  // The scales and offsets of kLanes rows from n on.
  static void TurnScales(const Weight& w, const ByteInput& in, int64_t n, int64_t count, float* scales, float* offsets) {
    for (int64_t base = 0; base < in.groups; base += kLanes) {
      const int64_t groups = in.groups - base < kLanes ? in.groups - base : kLanes;
      Floats scale[kLanes], offset[kLanes];
      for (int64_t r = 0; r < kLanes; ++r) {
        const int64_t row = n + (r < count ? r : count - 1), at = row * in.groups + base;
        __builtin_prefetch(static_cast<const char*>(w.scales) + (at + kRows * in.groups) * 2);
        scale[r] = V::LoadStored(w.scales, w.scales_type, at, groups);
        offset[r] = V::ZeroFloats();
        if (w.offsets != nullptr) {
          __builtin_prefetch(static_cast<const char*>(w.offsets) + (at + kRows * in.groups) * 2);
          offset[r] = V::LoadStored(w.offsets, w.offsets_type, at, groups);
        }
        if (w.integers) continue;
        const Ramp ramp = Ramp::Of(w, row);
        offset[r] = V::Fma(V::Broadcast(ramp.middle), scale[r], offset[r]);
        scale[r] = V::Multiply(V::Broadcast(ramp.step), scale[r]);
      }
      V::TurnFloats(scale);
      V::TurnFloats(offset);
      for (int64_t g = 0; g < groups; ++g) {
        V::StoreFloats(scales + (base + g) * kRows, scale[g]);
        V::StoreFloats(offsets + (base + g) * kRows, offset[g]);
      }
    }
  }

  // A tile by rows input to input + kInputs - 1 of x.
  template <int kInputs>
  static void Multiply(const Weight& w, const ByteInput& in, const Tile& tile, int64_t n, int64_t count, int64_t input,
                       const Output& out) {
    Floats sums[2][kInputs];
    for (auto& of_rows : sums) {
      for (Floats& sum : of_rows) sum = V::ZeroFloats();
    }
    const int64_t x_groups = (in.k + kGroup - 1) / kGroup, of_row = in.steps * kStepGroups;
    const int64_t together = in.groups == 1 ? x_groups : in.group_size / kGroup;
    const bool any_offsets = w.offsets != nullptr || !w.integers;
    for (int64_t g = 0, x_group = 0; g < in.groups; ++g) {
      const Floats scale[2] = {V::LoadFloats(tile.scales + g * kRows), V::LoadFloats(tile.scales + g * kRows + kLanes)};
      if (any_offsets) {
        for (int v = 0; v < 2; ++v) {
          const Floats offset = V::LoadFloats(tile.offsets + g * kRows + v * kLanes);
          for (int i = 0; i < kInputs; ++i) {
            sums[v][i] = V::Fma(offset, V::Broadcast(in.sums[(input + i) * in.groups + g]), sums[v][i]);
          }
        }
      }
      const int64_t end = x_group + together < x_groups ? x_group + together : x_groups;
      for (; x_group < end; ++x_group) {
        const uint8_t* const weights = tile.weights + x_group * kGroupBytes;
        const int64_t at = input * of_row + x_group;
        const int64_t within = x_group / kStepGroups * kStep + x_group % kStepGroups * 16;
        const int8_t* const q = in.values + input * of_row * kGroup + within;
        Ints dots[2][kInputs];
        for (int i = 0; i < kInputs; ++i) {
          const Ints start = V::kUnsigned ? V::BroadcastInts(in.totals + at + i * of_row) : V::Zero();
          dots[0][i] = dots[1][i] = start;
        }
        for (int64_t word = 0; word < kWords; ++word) {
          const Bytes first = V::Load(weights + word * 4 * kRows);
          const Bytes second = V::Load(weights + word * 4 * kRows + 4 * kLanes);
          const int8_t* const of_word = q + word / 4 * (kStep / 2) + word % 4 * 4;
          for (int i = 0; i < kInputs; ++i) {
            const Bytes four = V::BroadcastInts(of_word + i * of_row * kGroup);
            dots[0][i] = V::Dot(dots[0][i], first, four);
            dots[1][i] = V::Dot(dots[1][i], second, four);
          }
        }
        for (int i = 0; i < kInputs; ++i) {
          const Floats by = V::Broadcast(in.scales[4 * (at + i * of_row)]);
          for (int v = 0; v < 2; ++v) sums[v][i] = V::Fma(V::Multiply(V::ToFloats(dots[v][i]), by), scale[v], sums[v][i]);
        }
      }
    }
    for (int i = 0; i < kInputs; ++i) {
      if (count == kRows && out.type == Type::kFloat32) {
        float* const to = static_cast<float*>(out.y) + (input + i) * out.stride + n;
        V::StoreFloats(to, sums[0][i]);
        V::StoreFloats(to + kLanes, sums[1][i]);
        continue;
      }
      float totals[kRows];
      V::StoreFloats(totals, sums[0][i]);
      V::StoreFloats(totals + kLanes, sums[1][i]);
      for (int64_t r = 0; r < count; ++r) Store(out, input + i, n + r, totals[r]);
    }
  }

  static void Range(const Weight& w, const ByteInput& in, int64_t begin, int64_t end, const Output& out, char* scratch) {
    Tile tile;
    tile.weights = reinterpret_cast<uint8_t*>(scratch);
    tile.scales = reinterpret_cast<float*>(scratch + in.steps * kStepGroups * kGroupBytes);
    tile.offsets = tile.scales + in.groups * kRows;
    auto* const unpacked = reinterpret_cast<uint8_t*>(tile.offsets + in.groups * kRows);
    const bool as_stored = w.bits == kBits;
    const int64_t stride = as_stored ? PlaneBytes(w.k, kBits) : in.steps * kStepBytes;
    int8_t tables[kLanes][16] = {};
    for (int64_t n = begin; n < end; n += kRows) {
      const int64_t count = end - n < kRows ? end - n : kRows;
      for (int64_t v = 0; v < 2; ++v) {
        const int64_t first = v * kLanes < count ? n + v * kLanes : n, rows = end - first < kLanes ? end - first : kLanes;
        for (int64_t r = 0; r < rows; ++r) {
          if (kBits == 4) LoadTable(w, first + r, tables[r]);
          if (!as_stored) UnpackRow<kBits>(w, first + r, stride, unpacked + r * stride);
        }
        const uint8_t* const codes = as_stored ? w.codes + first * stride : unpacked;
        const bool ends = as_stored && (w.n - first - rows) * stride < in.steps * kStepBytes - stride;
        Look(in, codes, stride, tables, rows, ends, tile.weights + v * 4 * kLanes);
        TurnScales(w, in, first, rows, tile.scales + v * kLanes, tile.offsets + v * kLanes);
      }
      int64_t input = 0;
      for (; input + V::kManyAtOnce <= in.rows; input += V::kManyAtOnce) {
        Multiply<V::kManyAtOnce>(w, in, tile, n, count, input, out);
      }
      for (; input + 2 <= in.rows; input += 2) Multiply<2>(w, in, tile, n, count, input, out);
      for (; input < in.rows; ++input) Multiply<1>(w, in, tile, n, count, input, out);
    }
  }
};
