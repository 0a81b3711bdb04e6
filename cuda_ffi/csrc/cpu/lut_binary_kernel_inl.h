// The product with binary planes, over a vector type V; see lut_binary_kernel.h. It is included after lut_kernel_inl.h, and
// the same holds for it.

template <class V>
struct Binary {
  using Float = typename V::Float;
  using Int = typename V::Int;
  static constexpr int kLanes = V::kLanes;
  // Sums that don't wait for each other: each table is loaded once for so many vectors of rows.
  static constexpr int kSets = 4;
  static constexpr int kRows = kSets * kLanes;
  static constexpr int kInputs = V::kTableInputs;
  static constexpr int kEntries = 1 << kInputs;
  // The last table of a word may have fewer inputs.
  static constexpr int kSteps = (kWord + kInputs - 1) / kInputs;
  static constexpr int kWordFloats = kSteps * kEntries;

  static void Tables(const float* x, int64_t words, float* to) {
    for (int64_t word = 0; word < words; ++word) {
      float inputs[kSteps * kInputs] = {};
      __builtin_memcpy(inputs, x + word * kWord, kWord * sizeof(float));
      for (int step = 0; step < kSteps; ++step, to += kEntries) {
        // Signed sums in one order, so that the entries of a pattern and of its opposite differ in sign alone.
        to[0] = 0;
        for (int i = 0; i < kInputs; ++i) {
          const float value = inputs[step * kInputs + i];
          for (int p = 0; p < 1 << i; ++p) {
            to[p + (1 << i)] = to[p] + value;
            to[p] -= value;
          }
        }
      }
    }
  }

  // Rearranges rows of `bytes` each, of 4 bytes an item: to[item, row], with items filled up to quads. There are
  // `count` rows; the last is repeated.
  static void Columns(const void* from, int64_t bytes, int64_t count, void* to) {
    constexpr int64_t kBytes = 4 * kQuad;
    for (int set = 0; set < kSets; ++set) {
      const uint8_t* rows[kLanes];
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t row = set * kLanes + lane;
        rows[lane] = static_cast<const uint8_t*>(from) + (row < count ? row : count - 1) * bytes;
      }
      uint8_t* here = static_cast<uint8_t*>(to) + set * kLanes * 4;
      const auto turn = [&](int64_t at) __attribute__((always_inline)) {
        Int columns[kQuad];
        V::Turn(rows, at, columns);
        for (int64_t i = 0; i < kQuad; ++i, here += kRows * 4) V::StoreWords(here, columns[i]);
      };
      int64_t at = 0;
      for (; at + kBytes <= bytes; at += kBytes) turn(at);
      if (at == bytes) continue;
      // Nothing may be read beyond the last row.
      uint8_t rest[kLanes * kBytes] = {};
      for (int lane = 0; lane < kLanes; ++lane) {
        __builtin_memcpy(rest + lane * kBytes, rows[lane] + at, bytes - at);
        rows[lane] = rest + lane * kBytes;
      }
      turn(0);
    }
  }

  // What `Multiply` works in.
  struct Space {
    uint8_t* words;                   // of 4 bytes [words, kRows]
    float *scales, *offsets, *shift;  // [kRows, groups]
    float *scale, *shift_of;          // [groups, kRows]
    float* totals;                    // [rows of x, kRows]

    Space(const BinaryInput& in, char* scratch) {
      const auto take = [&](int64_t items) {
        char* const taken = scratch;
        scratch += (items * 4 + kBeyond - 1) / kBeyond * kBeyond;
        return taken;
      };
      words = reinterpret_cast<uint8_t*>(take(InQuads(in.words) * kRows));
      for (float** array : {&scales, &offsets, &shift}) *array = reinterpret_cast<float*>(take(in.groups * kRows));
      for (float** array : {&scale, &shift_of}) *array = reinterpret_cast<float*>(take(InQuads(in.groups) * kRows));
      totals = reinterpret_cast<float*>(take(kBinaryInputRows * kRows));
    }
  };

  // Reads the scales of rows [first, first + count) of a plane. Its table (a, b) is the middle -+ half the step: the
  // half multiplies the scales, and the middle adds to the shift, as do offsets. Returns whether something was added.
  static bool LoadScales(const Weight& w, int64_t first, int64_t count, Space& space) {
    const int64_t groups = w.groups();
    bool shifted = w.offsets != nullptr;
    Widen(w.scales, w.scales_type, first * groups, count * groups, space.scales);
    if (shifted) {
      Widen(w.offsets, w.offsets_type, first * groups, count * groups, space.offsets);
      for (int64_t i = 0; i < count * groups; ++i) space.shift[i] += space.offsets[i];
    }
    float table[2] = {};
    for (int64_t row = 0; row < count; ++row) {
      if (row == 0 || w.lut_rows > 1) Widen(w.lut, w.lut_type, (w.lut_rows > 1 ? first + row : 0) * 2, 2, table);
      const float half = (table[1] - table[0]) / 2, middle = (table[0] + table[1]) / 2;
      if (half == 1 && middle == 0) continue;
      shifted = true;
      for (int64_t i = row * groups; i < (row + 1) * groups; ++i) {
        space.shift[i] += middle * space.scales[i];
        space.scales[i] *= half;
      }
    }
    return shifted;
  }

  // Adds the product of a row of x with one plane to the sums of kRows rows. Meanwhile it fetches the codes of kRows
  // rows at `ahead`: the processor's own prefetching doesn't follow Columns, which reads so many rows side by side.
  static void AddPlane(const BinaryInput& in, const float* table, const Space& space, const uint8_t* ahead,
                       float* totals) {
    const uint8_t* word = space.words;
    Float total[kSets];
    for (int set = 0; set < kSets; ++set) total[set] = V::Load(totals + set * kLanes);
    for (int64_t g = 0, left = in.words; g < in.groups; ++g, left -= in.group_words) {
      Float sum[kSets];
      for (Float& s : sum) s = V::Zero();
      for (int64_t i = left < in.group_words ? left : in.group_words; i > 0; --i) {
        for (int at = 0; at < kRows * 4; at += kBeyond) __builtin_prefetch(ahead + (word - space.words) + at);
        Int codes[kSets];
        for (int set = 0; set < kSets; ++set) codes[set] = V::LoadWords(word + set * kLanes * 4);
        ForSteps<V, kSteps>([&](auto step) __attribute__((always_inline)) {
          const typename V::template Table<kInputs> entries(table + step * kEntries);
          for (int set = 0; set < kSets; ++set) {
            sum[set] = V::Add(sum[set], entries.At(V::ShiftRight(codes[set], Times<kInputs>(step))));
          }
        });
        word += kRows * 4;
        table += kWordFloats;
      }
      for (int set = 0; set < kSets; ++set) {
        total[set] = V::Fma(sum[set], V::Load(space.scale + g * kRows + set * kLanes), total[set]);
      }
    }
    for (int set = 0; set < kSets; ++set) V::Store(totals + set * kLanes, total[set]);
  }

  static void Multiply(const Product* planes, int64_t planes_count, const BinaryInput& in, int64_t begin, int64_t end,
                       const Output& out, char* scratch) {
    Space space(in, scratch);
    const int64_t row_bytes = PlaneBytes(planes->weight.k, 1), group_bytes = in.groups * 4;
    for (int64_t first = begin; first < end; first += kRows) {
      const int64_t count = kRows < end - first ? kRows : end - first;
      for (int64_t i = 0; i < in.rows * kRows; ++i) space.totals[i] = 0;
      for (int64_t i = 0; i < count * in.groups; ++i) space.shift[i] = 0;
      bool shifted = false;
      for (int64_t p = 0; p < planes_count; ++p) {
        const Weight& w = planes[p].weight;
        shifted |= LoadScales(w, first, count, space);
        Columns(space.scales, group_bytes, count, space.scale);
        Columns(w.codes + first * row_bytes, row_bytes, count, space.words);
        const uint8_t* const ahead = p + 1 < planes_count ? planes[p + 1].weight.codes + first * row_bytes
                                                          : planes->weight.codes + (first + kRows) * row_bytes;
        for (int64_t r = 0; r < in.rows; ++r) {
          AddPlane(in, in.tables + r * in.table_stride, space, ahead, space.totals + r * kRows);
        }
      }
      if (shifted) Columns(space.shift, group_bytes, count, space.shift_of);
      for (int64_t r = 0; r < in.rows; ++r) {
        float* totals = space.totals + r * kRows;
        for (int64_t g = 0; shifted && g < in.groups; ++g) {
          const float sum = in.sums[r * in.groups + g];
          for (int64_t i = 0; i < kRows; ++i) totals[i] += space.shift_of[g * kRows + i] * sum;
        }
        for (int64_t i = 0; i < count; ++i) Store(out, r, first + i, totals[i]);
      }
    }
  }

  static constexpr BinaryKernel kKernel = {kRows, kWordFloats, &Tables, &Multiply};
};
