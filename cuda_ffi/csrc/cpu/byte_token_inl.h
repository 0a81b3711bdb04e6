// The kernel for rows of x with one scale each, over a vector type V; see byte_kernel_inl.h. A few rows of the weight are
// decoded to integers, which all rows of x multiply: within a group of the weight sums are of integers.
//
// Of V it needs, besides what others do,
//   TokenWeight, TokenQ    the integers of the weight and of x, as many as fit into Bytes, which is a step
//   TokenDot(sum, weights, q)  adds to each lane the products of its integers
//   LoadCodes(at)              integers of the weight from codes of 8 bits, where weights have signs
//   kTokenInputs               rows of x at a time
//   Hold(vector)               the same, in a register: compilers else load from memory what is multiplied twice

template <class V>
struct TokenMultiply {
  using Bytes = typename V::Bytes;
  using Floats = typename V::Floats;
  using Item = typename V::TokenWeight;
  static constexpr int64_t kLanes = V::kLanes, kItems = sizeof(Bytes) / sizeof(Item);
  // Codes that are decoded at a time, in a level-1 cache.
  static constexpr int64_t kCodes = 256;

  // `count` codes of one group, from the first of a byte on: value, or value + 128 where the set has no signs.
  __attribute__((noinline)) static void Decode(const Weight& w, const uint8_t* low, const uint8_t* high, const typename V::Table& table,
                     int64_t count, Item* to) {
    const int bias = V::kUnsigned ? 128 - (1 << (w.bits - 1)) : -(1 << (w.bits - 1));
    // Vectors look up codes beyond the last one too, so that these are codes as well.
    uint8_t unpacked[kCodes] = {}, values[kCodes];
    for (int64_t first = 0; first < count; first += kCodes) {
      const int64_t n = count - first < kCodes ? count - first : kCodes;
      const uint8_t* codes = low + first;
      if (w.bits < 8) {
        UnpackCodes<8>(w.bits, low + first * LowBits(w.bits) / 8, high + first * HighBits(w.bits) / 8, n, unpacked);
        codes = unpacked;
      } else {
        for (int64_t i = 0; i < n; i += 64) __builtin_prefetch(codes + 4096 + i);
      }
      if (w.integers) {
        for (int64_t i = 0; i < n; i += sizeof(Bytes)) V::StoreBytes(values + i, table.Look(V::Load(unpacked + i)));
        for (int64_t i = 0; i < n; ++i) {
          to[first + i] = static_cast<Item>(V::kUnsigned ? values[i] : static_cast<int8_t>(values[i]));
        }
      } else {
        for (int64_t i = 0; i < n; ++i) to[first + i] = static_cast<Item>(codes[i] + bias);
      }
    }
  }

  static void DecodeRow(const Weight& w, const TokenInput& in, const int8_t* values, int64_t n, Item* to) {
    const int64_t low_stride = PlaneBytes(w.k, LowBits(w.bits)), high_stride = PlaneBytes(w.k, HighBits(w.bits));
    typename V::Table table;
    table.Set(values);
    // Groups that are whole steps lie one after another in the tile as they do in the row.
    if (in.groups == 1 || w.group_size == in.group_steps * kItems) {
      Decode(w, w.codes + n * low_stride, w.high + n * high_stride, table, w.k, to);
      const int64_t end = ((in.groups - 1) * in.group_steps + in.last_steps) * kItems;
      for (int64_t i = w.k; i < end; ++i) to[i] = 0;
      return;
    }
    for (int64_t g = 0; g < in.groups; ++g) {
      const int64_t first = g * w.group_size, left = w.k - first, count = left < w.group_size ? left : w.group_size;
      Item* const group = to + g * in.group_steps * kItems;
      Decode(w, w.codes + n * low_stride + first * LowBits(w.bits) / 8,
             w.high + n * high_stride + first * HighBits(w.bits) / 8, table, count, group);
      for (int64_t i = count; i < in.Steps(g) * kItems; ++i) group[i] = 0;
    }
  }

  // A step of a row of the tile, or of codes of 8 bits.
  template <class T>
  static Bytes Weights(const T* at) {
    if constexpr (!V::kUnsigned && T(-1) > T(0)) {
      return V::LoadCodes(at);
    } else {
      return V::Load(at);
    }
  }

  // The rows of the tile by kInputs rows of x: sums over K, of which x's scale is no part. A tile with fewer rows than
  // kTokenRows has its last one several times. Instead of a tile there may be codes of 8 bits, as they are stored.
  template <int kInputs, class T>
  static inline __attribute__((always_inline)) void Sums(const TokenInput& in, const ByteRows& rows, const T* tile,
                                                         int64_t stride, int64_t count, int64_t input,
                                                         float (&totals)[kTokenRows][kInputs]) {
    constexpr int kRows = kTokenRows;
    const auto* const values = static_cast<const typename V::TokenQ*>(in.values) + input * in.stride;
    const T* of_row[kRows];
    const float* scales[kRows];
    Floats sums[kRows][kInputs];
    for (int r = 0; r < kRows; ++r) {
      const int64_t row = r < count ? r : count - 1;
      of_row[r] = tile + row * stride;
      scales[r] = rows.scales + row * in.groups;
      for (Floats& sum : sums[r]) sum = V::ZeroFloats();
    }
    for (int64_t g = 0; g < in.groups; ++g) {
      typename V::Ints dots[kRows][kInputs];
      for (int i = 0; i < kInputs; ++i) {
        const auto start = V::kUnsigned ? V::LoadInts(in.starts + ((input + i) * in.groups + g) * kLanes) : V::Zero();
        for (int r = 0; r < kRows; ++r) dots[r][i] = start;
      }
      const int64_t begin = g * in.group_steps * kItems, end = begin + in.Steps(g) * kItems;
      for (int64_t at = begin; at < end; at += kItems) {
        Bytes weights[kRows];
        for (int r = 0; r < kRows; ++r) {
          // A page ahead, since the processor's own prefetching ends there.
          if (sizeof(T) == 1 && kInputs == 1) __builtin_prefetch(of_row[r] + at + 4096);
          weights[r] = V::Hold(Weights(of_row[r] + at));
        }
        for (int i = 0; i < kInputs; ++i) {
          const Bytes q = V::Hold(V::Load(values + i * in.stride + at));
          for (int r = 0; r < kRows; ++r) dots[r][i] = V::TokenDot(dots[r][i], weights[r], q);
        }
      }
      for (int r = 0; r < kRows; ++r) {
        const Floats scale = V::Broadcast(scales[r][g]);
        for (int i = 0; i < kInputs; ++i) sums[r][i] = V::Fma(V::ToFloats(dots[r][i]), scale, sums[r][i]);
      }
    }
    for (int r = 0; r < count; ++r) {
      for (int i = 0; i < kInputs; ++i) {
        Floats sum = sums[r][i];
        if (rows.any_offsets) {
          sum = AddOffsets<V>(sum, rows.offsets + r * in.groups, in.sums + (input + i) * in.groups, in.groups);
        }
        totals[r][i] = V::Sum(sum);
      }
    }
  }

  // All rows of x from `input` on, kInputs at a time, then fewer.
  template <int kInputs, class T>
  static void Inputs(const TokenInput& in, const ByteRows& rows, const T* tile, int64_t stride, int64_t n,
                     int64_t count, int64_t input, const float* of_ones, const Output& out) {
    float totals[kTokenRows][kInputs];
    for (; input + kInputs <= in.rows; input += kInputs) {
      Sums<kInputs>(in, rows, tile, stride, count, input, totals);
      for (int64_t r = 0; r < count; ++r) {
        for (int i = 0; i < kInputs; ++i) {
          // With q - z in place of q.
          const float total = totals[r][i] - (in.ones < 0 ? 0 : in.zeros[input + i] * of_ones[r]);
          Store(out, input + i, n + r, in.scales[input + i] * total);
        }
      }
    }
    if constexpr (kInputs > 1) {
      if (input < in.rows) Inputs<kInputs / 2>(in, rows, tile, stride, n, count, input, of_ones, out);
    }
  }

  // All rows of x, the ones before, by rows [n, n + count) of the weight.
  template <int kInputs, class T>
  static void Multiply(const TokenInput& in, const ByteRows& rows, const T* tile, int64_t stride, int64_t n,
                       int64_t count, const Output& out) {
    float of_ones[kTokenRows] = {};
    if (in.ones >= 0) {
      float totals[kTokenRows][1];
      Sums<1>(in, rows, tile, stride, count, in.ones, totals);
      for (int64_t r = 0; r < count; ++r) of_ones[r] = totals[r][0];
    }
    Inputs<kInputs>(in, rows, tile, stride, n, count, 0, of_ones, out);
  }

  static void Range(const Weight& w, const TokenInput& in, int64_t begin, int64_t end, const Output& out,
                    char* scratch) {
    auto* const tile = reinterpret_cast<Item*>(scratch);
    ByteRows rows(w, reinterpret_cast<float*>(tile + kTokenRows * in.stride));
    // One row of x reads each code once: a tile of them would only cost.
    const bool whole = in.groups == 1 || w.group_size == in.group_steps * kItems;
    const bool as_stored = in.rows == 1 && w.bits == 8 && whole && w.k % kItems == 0;
    for (int64_t first = begin; first < end; first += kTokenRows) {
      const int64_t count = end - first < kTokenRows ? end - first : kTokenRows;
      rows.Load(w, first, count);
      if (as_stored) {
        Multiply<1>(in, rows, w.codes + first * w.k, w.k, first, count, out);
        continue;
      }
      for (int64_t r = 0; r < count; ++r) DecodeRow(w, in, rows.tables[r], first + r, tile + r * in.stride);
      Multiply<V::kTokenInputs>(in, rows, tile, in.stride, first, count, out);
    }
  }
};
