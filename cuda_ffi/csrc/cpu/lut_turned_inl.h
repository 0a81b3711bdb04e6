// A coded matrix with its axes exchanged, over a vector type V; see lut_turned.h. It is included after lut_codes_inl.h,
// and the same holds for it. What a row reads lies a row of codes apart, often a power of two, where all compete for the
// same few places of the cache. So a tile's rows read each of these lines once, 16 bytes of as many columns as there are
// lanes, and turn them: vectors then have the words of one place and neighbouring columns.

// The values of one row of a tile, with codes of kBits, for as many columns as there are lanes.
template <class V, int kBits>
struct TurnedRow {
  using Float = typename V::Float;
  static constexpr int kLow = LowBits(kBits), kHigh = HighBits(kBits), kOfWord = 32 / kLow;

  const TurnedTile& tile;
  const typename V::template Table<kBits> table;
  const uint8_t *low, *high;
  const float *scales, *offsets;
  int shift, high_shift;

  explicit TurnedRow(const TurnedTile& of) : tile(of), table(of.levels) {}

  void Take(int64_t row) {
    low = tile.low + row / kOfWord * tile.columns * 4;
    high = tile.high + row / kOfWord * tile.columns * 4;
    scales = tile.scales + row / tile.rows * tile.columns;
    offsets = tile.offsets + row / tile.rows * tile.columns;
    shift = static_cast<int>(row % kOfWord) * kLow;
    high_shift = static_cast<int>(row % kOfWord) * kHigh;
  }

  // Of the columns from c on.
  inline __attribute__((always_inline)) Float At(int64_t c) const {
    auto code = V::ShiftRight(V::LoadWords(low + c * 4), shift);
    if constexpr (kHigh > 0) {
      code = V::template Select<(1 << kLow) - 1>(code, V::ShiftRight(V::LoadWords(high + c * 4), high_shift));
    }
    return V::Fma(table.At(code), V::Load(scales + c), V::Load(offsets + c));
  }
};

template <class V>
struct TurnedOf {
  using Int = typename V::Int;
  static constexpr int64_t kLanes = V::kLanes, kBytes = 16, kWords = kBytes / 4;

  // to[i, c] is the word i after byte `at` of column c, of `stride` bytes; after the last column it is repeated, and
  // after the last byte come zeros.
  static void Words(const void* plane, int64_t stride, int64_t at, int64_t columns, uint8_t* to) {
    const auto* first = static_cast<const uint8_t*>(plane) + at;
    const int64_t end = columns * stride - at, padded = TurnedColumns(columns);
    for (int64_t c = 0; c < padded; c += kLanes) {
      const uint8_t* rows[kLanes];
      const int64_t last = c + kLanes < columns ? c + kLanes - 1 : columns - 1;
      for (int64_t lane = 0; lane < kLanes; ++lane) rows[lane] = first + (c + lane < last ? c + lane : last) * stride;
      uint8_t rest[kLanes * kBytes];
      if (last * stride + kBytes > end) {
        __builtin_memset(rest, 0, sizeof rest);
        for (int64_t lane = 0; lane < kLanes; ++lane) {
          const int64_t left = first + end - rows[lane];
          __builtin_memcpy(rest + lane * kBytes, rows[lane], left < kBytes ? left : kBytes);
          rows[lane] = rest + lane * kBytes;
        }
      }
      Int words[kWords];
      V::Turn(rows, 0, words);
      for (int64_t i = 0; i < kWords; ++i) V::StoreWords(to + (i * padded + c) * 4, words[i]);
    }
  }

  // Makes two words of each of the first `count` words, one of each half; body(half's number, word) is what is stored.
  template <class Body>
  static void Split(int64_t count, int64_t padded, uint8_t* words, const Body& body) {
    // Backwards, so that no word is overwritten before it is split.
    for (int64_t i = count - 1; i >= 0; --i) {
      for (int64_t c = 0; c < padded; c += kLanes) {
        const Int two = V::LoadWords(words + (i * padded + c) * 4);
        V::StoreWords(words + ((2 * i + 1) * padded + c) * 4, body(1, two));
        V::StoreWords(words + (2 * i * padded + c) * 4, body(0, two));
      }
    }
  }

  // The scales or offsets of the ranges. Returns for how many rows each holds.
  static int64_t Ranges(const Turned& t, const void* from, int64_t begin, float* to) {
    constexpr int64_t kRun = kTurnedRows * 2 / kBytes;
    const int64_t padded = TurnedColumns(t.columns), runs = t.runs();
    if (t.type == Type::kBfloat16 && t.run == kRun) {
      auto* const words = reinterpret_cast<uint8_t*>(to);
      Words(from, runs * 2, begin / t.run * 2, t.columns, words);
      Split(kWords, padded, words, [](int half, Int two) {
        return V::ShiftLeft(half == 0 ? two : V::ShiftRight(two, Step<16>()), Step<16>());
      });
      return kRun;
    }
    for (int64_t j = 0; j < kTurnedRows / kTurnedChunk; ++j) {
      const int64_t run = (begin + j * kTurnedChunk) / t.run;
      for (int64_t c = 0; c < padded; ++c) {
        const int64_t at = (c < t.columns ? c : t.columns - 1) * runs + (run < runs ? run : runs - 1);
        to[j * padded + c] = t.type == Type::kBfloat16 ? ToFloat(static_cast<const uint16_t*>(from)[at])
                                                       : static_cast<const float*>(from)[at];
      }
    }
    return kTurnedChunk;
  }

  static void Gather(const Turned& t, int64_t begin, TurnedTile& tile) {
    const int low = LowBits(t.bits), high = HighBits(t.bits);
    const int64_t padded = tile.columns, left = t.n - begin;
    const int64_t of_quad = kBytes * 8 / low;
    for (int64_t row = 0; row < kTurnedRows && row < left; row += of_quad) {
      Words(t.low, PlaneBytes(t.n, low), (begin + row) * low / 8, t.columns, tile.low + row * low / 32 * padded * 4);
    }
    if (high > 0) {
      Words(t.high, PlaneBytes(t.n, high), begin * high / 8, t.columns, tile.high);
      Split(kWords, padded, tile.high, [](int half, Int two) {
        return half == 0 ? V::ShiftLeft(two, Step<2>()) : V::ShiftRight(two, Step<14>());
      });
    }
    tile.rows = Ranges(t, t.scales, begin, tile.scales);
    Ranges(t, t.offsets, begin, tile.offsets);
  }

  template <int kBits>
  static void DecodeBits(const TurnedTile& tile, int64_t columns, int64_t count, float* to) {
    TurnedRow<V, kBits> of_row(tile);
    for (int64_t row = 0; row < count; ++row, to += columns) {
      of_row.Take(row);
      int64_t c = 0;
      for (; c + kLanes <= columns; c += kLanes) V::Store(to + c, of_row.At(c));
      if (c == columns) continue;
      float last[kLanes];
      V::Store(last, of_row.At(c));
      __builtin_memcpy(to + c, last, (columns - c) * sizeof(float));
    }
  }

  static void Decode(const Turned& t, const TurnedTile& tile, int64_t count, float* to) {
    switch (t.bits) {
      case 2: return DecodeBits<2>(tile, t.columns, count, to);
      case 3: return DecodeBits<3>(tile, t.columns, count, to);
      default: return DecodeBits<4>(tile, t.columns, count, to);
    }
  }

  static constexpr TurnedKernel kKernel = {&Gather, &Decode};
};
