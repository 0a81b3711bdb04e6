// The kernels, over a vector type V. Each instruction set's file includes this one inside its own namespace, so that
// the linker never merges code of different sets. For the same reason it calls nothing of the standard library.

#include "lut_rows_inl.h"
#include "lut_codes_inl.h"
#include "lut_tile_inl.h"
#include "lut_turned_inl.h"

template <class V, int kBits>
struct Kernel {
  using Float = typename V::Float;
  static constexpr int kLanes = V::kLanes;
  static constexpr int kSteps = CodesPerWord(kBits);
  static constexpr int kBlock = kLanes * kSteps;
  static constexpr int kLowBytes = kLanes * 4;
  static constexpr int kHighBytes = kBlock * HighBits(kBits) / 8;
  // Codes are prefetched a page ahead, since the processor's own prefetching ends there: a quarter more bytes a second.
  static constexpr int kAhead = 4096;

  // Calls body(block, codes, steps) for the blocks [begin, end) of row n; `steps` is a Step.
  template <class Body>
  static inline __attribute__((always_inline)) void ForBlocks(const Weight& w, const Input& in, int64_t n,
                                                              int64_t begin, int64_t end, const Body& body) {
    const int64_t low_stride = PlaneBytes(w.k, LowBits(kBits)), high_stride = PlaneBytes(w.k, HighBits(kBits));
    const uint8_t* low = w.codes + n * low_stride;
    const uint8_t* high = kHighBytes > 0 ? w.high + n * high_stride : nullptr;
    const int64_t whole = w.k / kBlock < end ? w.k / kBlock : end;
    Codes<V, kBits> codes;
    for (int64_t b = begin; b < whole; ++b) {
      __builtin_prefetch(low + b * kLowBytes + kAhead);
      codes.Load(low + b * kLowBytes, high + b * kHighBytes);
      body(b, codes, Step<kSteps>());
    }
    if (whole == end) return;
    low += whole * kLowBytes;
    high += whole * kHighBytes;
    // After a row come the next row's bytes, which do no harm, since x has zeros there. After the last row no bytes may
    // be read, so its own are copied.
    const int64_t low_left = (w.n - n) * low_stride - whole * kLowBytes;
    const int64_t high_left = (w.n - n) * high_stride - whole * kHighBytes;
    uint8_t last_low[kLowBytes] = {}, last_high[kHighBytes + 1] = {};
    if (low_left < (in.half ? kLowBytes / 2 : kLowBytes) || high_left < kHighBytes) {
      __builtin_memcpy(last_low, low, low_stride - whole * kLowBytes);
      low = last_low;
      if constexpr (kHighBytes > 0) {
        __builtin_memcpy(last_high, high, high_stride - whole * kHighBytes);
        high = last_high;
      }
    }
    if constexpr (kHighBytes == 0) {
      if (in.half) {
        codes.LoadHalf(low);
        return body(whole, codes, Step<kSteps / 2>());
      }
    }
    codes.Load(low, high);
    body(whole, codes, Step<kSteps>());
  }

  // The scale or offset of each lane of a block.
  template <class T>
  static inline Float OfLanes(const T* per_group, const Input& in, int64_t block) {
    const T* first = per_group + in.group[block];
    return in.whole_blocks ? V::Broadcast(ToFloat(first[0])) : V::Pick(first, in.relative + block * kLanes);
  }

  // For kRows rows of x. Scales multiply a block's sum, offsets a group's sum of x. T is float if scales and offsets
  // are widened into the scratch, or uint16_t if they are read as they are stored: a vector load that spans the
  // widening's stores would wait until these reach the cache.
  template <int kRows, class T>
  static void FewRows(const Weight& w, const Input& in, int64_t begin, int64_t end, const Output& out,
                      float* scratch) {
    constexpr bool kStored = sizeof(T) == 2;
    Rows<kBits> rows(w, in, scratch);
    const int64_t groups = rows.groups;
    for (int64_t n = begin; n < end; ++n) {
      const int64_t row = (n - begin) % kTableRows;
      if (row == 0) rows.template Load<kStored>(w, n, kTableRows < end - n ? kTableRows : end - n);
      const T* scales;
      const T* offsets;
      if constexpr (kStored) {
        // Loads read up to `padding` scales beyond a row, and after the last rows there are fewer.
        const bool inside = (w.n - n - 1) * groups >= in.padding;
        scales = inside ? static_cast<const T*>(w.scales) + n * groups : rows.Padded(w, n);
        offsets = static_cast<const T*>(w.offsets) + n * groups;
      } else {
        scales = rows.scales + row * groups;
        offsets = rows.offsets + row * groups;
      }
      const typename V::template Table<kBits> table(rows.table(w, row));
      Float total[kRows];
      for (int r = 0; r < kRows; ++r) total[r] = V::Zero();
      ForBlocks(w, in, n, 0, in.blocks, [&](int64_t block, const auto& codes, auto steps) __attribute__((always_inline)) {
        const float* x = in.values + block * kBlock;
        Float sum[kRows][2];
        ForSteps<V, decltype(steps)::value>([&](auto step) __attribute__((always_inline)) {
          const Float weight = table.At(codes.At(step));
          // Two chains of additions, since one chain would wait four cycles for each addition.
          for (int r = 0; r < kRows; ++r) {
            const Float values = V::Load(x + r * in.stride + step * kLanes);
            sum[r][step % 2] = step < 2 ? V::Multiply(weight, values) : V::Fma(weight, values, sum[r][step % 2]);
          }
        });
        const Float scale = OfLanes(scales, in, block);
        for (int r = 0; r < kRows; ++r) total[r] = V::Fma(scale, V::Add(sum[r][0], sum[r][1]), total[r]);
      });
      for (int r = 0; r < kRows; ++r) {
        if (w.offsets != nullptr) {
          for (int64_t g = 0; g < groups; g += kLanes) {
            const Float offset = V::LoadFirst(offsets + g, groups - g);
            total[r] = V::Fma(offset, V::Load(in.sums + r * in.sums_stride + g), total[r]);
          }
        }
        Store(out, r, n, V::Sum(total[r]));
      }
    }
  }

  template <class T>
  static void FewOf(const Weight& w, const Input& in, int64_t begin, int64_t end, const Output& out,
                    float* scratch) {
    switch (in.rows) {
      case 1: return FewRows<1, T>(w, in, begin, end, out, scratch);
      case 2: return FewRows<2, T>(w, in, begin, end, out, scratch);
      default: return FewRows<4, T>(w, in, begin, end, out, scratch);
    }
  }

  static void Few(const Weight& w, const Input& in, int64_t begin, int64_t end, const Output& out, float* scratch) {
    const bool stored = w.scales_type == Type::kBfloat16 && (w.offsets == nullptr || w.offsets_type == w.scales_type);
    (stored ? FewOf<uint16_t> : FewOf<float>)(w, in, begin, end, out, scratch);
  }

  // The same for one row of x, with scales and offsets of 3 bits, turned. A lane's codes are a group.
  static void FewTurned(const Weight& w, const Input& in, const TurnedTile& scales, const TurnedTile* offsets,
                        int64_t end, const Output& out, float* scratch) {
    Rows<kBits> rows(w, in, scratch);
    TurnedRow<V, 3> scale(scales), offset(offsets != nullptr ? *offsets : scales);
    for (int64_t n = 0; n < end; ++n) {
      const int64_t row = n % kTableRows;
      if (row == 0) rows.template Load<true>(w, n, kTableRows < end - n ? kTableRows : end - n);
      const typename V::template Table<kBits> table(rows.table(w, row));
      scale.Take(n);
      Float total = V::Zero();
      ForBlocks(w, in, n, 0, in.blocks, [&](int64_t block, const auto& codes, auto steps) __attribute__((always_inline)) {
        const float* x = in.values + block * kBlock;
        Float sum[2];
        ForSteps<V, decltype(steps)::value>([&](auto step) __attribute__((always_inline)) {
          const Float weight = table.At(codes.At(step)), values = V::Load(x + step * kLanes);
          sum[step % 2] = step < 2 ? V::Multiply(weight, values) : V::Fma(weight, values, sum[step % 2]);
        });
        total = V::Fma(scale.At(block * kLanes), V::Add(sum[0], sum[1]), total);
      });
      if (offsets != nullptr) {
        offset.Take(n);
        for (int64_t g = 0; g < rows.groups; g += kLanes) total = V::Fma(offset.At(g), V::Load(in.sums + g), total);
      }
      Store(out, 0, n, V::Sum(total));
    }
  }

  // Decodes blocks [begin, end) of row n to floats in the order of Input, or adds them to what is there.
  template <bool kAdd>
  static void Decode(const Weight& w, const Input& in, const float* entries, const float* scales,
                     const float* offsets, int64_t n, int64_t begin, int64_t end, float* to) {
    const typename V::template Table<kBits> table(entries);
    ForBlocks(w, in, n, begin, end, [&](int64_t block, const auto& codes, auto steps) __attribute__((always_inline)) {
      const Float scale = OfLanes(scales, in, block);
      const Float offset = w.offsets != nullptr ? OfLanes(offsets, in, block) : V::Zero();
      float* here = to + (block - begin) * kBlock;
      ForSteps<V, decltype(steps)::value>([&](auto step) __attribute__((always_inline)) {
        const Float other = kAdd ? V::Add(V::Load(here + step * kLanes), offset) : offset;
        V::Store(here + step * kLanes, V::Fma(table.At(codes.At(step)), scale, other));
      });
      for (int step = steps; step < kSteps; ++step) V::Store(here + step * kLanes, V::Zero());
    });
  }

  // The same code by code, for groups that begin within a word.
  template <bool kAdd>
  static void DecodeSingly(const Weight& w, const float* entries, const float* scales, const float* offsets,
                           int64_t n, int64_t begin, int64_t end, float* to) {
    constexpr int kLow = LowBits(kBits), kHigh = HighBits(kBits);
    const uint8_t* low = w.codes + n * PlaneBytes(w.k, kLow);
    const uint8_t* high = kHigh > 0 ? w.high + n * PlaneBytes(w.k, kHigh) : nullptr;
    for (int64_t i = 0; i < (end - begin) * kBlock; ++i) {
      const int64_t k = begin * kBlock + i;
      const int64_t within = i % kBlock;
      float* place = to + (i - within) + within % kSteps * kLanes + within / kSteps;
      if (k >= w.k) {
        *place = 0;
        continue;
      }
      int code = low[k * kLow / 8] >> (k * kLow % 8) & ((1 << kLow) - 1);
      if constexpr (kHigh > 0) code |= (high[k * kHigh / 8] >> (k * kHigh % 8) & ((1 << kHigh) - 1)) << kLow;
      const int64_t group = k / w.group_size;
      const float other = (kAdd ? *place : 0) + (w.offsets != nullptr ? offsets[group] : 0);
      *place = entries[code] * scales[group] + other;
    }
  }

  // Decodes the blocks [first, last) of `count` rows from row n on.
  template <bool kAdd>
  static void DecodeRows(const Weight& w, const Input& in, Rows<kBits>& rows, int64_t n, int64_t count, int64_t first,
                         int64_t last, float* decoded) {
    rows.Load(w, n, count);
    for (int64_t d = 0; d < kDecodedRows; ++d) {
      // Where too few rows are left, the last one is repeated, and the surplus sums are never stored.
      const int64_t row = d < count ? d : count - 1;
      const float* scales = rows.scales + row * rows.groups;
      const float* offsets = rows.offsets + row * rows.groups;
      float* to = decoded + d * kDecodedStride;
      if (in.whole_lanes) {
        Decode<kAdd>(w, in, rows.table(w, row), scales, offsets, n + row, first, last, to);
      } else {
        DecodeSingly<kAdd>(w, rows.table(w, row), scales, offsets, n + row, first, last, to);
      }
    }
  }

  static void Many(const Product* planes, int64_t planes_count, const Input& in, int64_t begin, int64_t end,
                   const Output& out, float* scratch) {
    constexpr int64_t kChunk = kDecodedFloats / kBlock;
    static_assert(kDecodedFloats % kBlock == 0);
    float* decoded = scratch;
    float* sums = decoded + kDecodedRows * kDecodedStride;
    const Weight& w = planes->weight;
    Rows<kBits> rows(w, in, sums + kTaskRows * kInputRows);
    for (int64_t i = 0; i < in.rows * kTaskRows; ++i) sums[i] = 0;
    for (int64_t first = 0; first < in.blocks; first += kChunk) {
      const int64_t last = first + kChunk < in.blocks ? first + kChunk : in.blocks;
      for (int64_t n = begin; n < end; n += kDecodedRows) {
        const int64_t count = kDecodedRows < end - n ? kDecodedRows : end - n;
        DecodeRows<false>(w, in, rows, n, count, first, last, decoded);
        if constexpr (kBits == 1) {
          for (int64_t p = 1; p < planes_count; ++p) {
            rows.shared_table_loaded = false;
            DecodeRows<true>(planes[p].weight, in, rows, n, count, first, last, decoded);
            rows.shared_table_loaded = false;
          }
        }
        Tiles<V, V::kTileRows>(in.values + first * kBlock, in.rows, in.stride, decoded, (last - first) * kBlock,
                               sums + (n - begin));
      }
    }
    for (int64_t r = 0; r < in.rows; ++r) {
      for (int64_t n = begin; n < end; ++n) Store(out, r, n, sums[r * kTaskRows + n - begin]);
    }
  }

  static constexpr LutKernel Kernels() {
    if constexpr (kBits == 2 || kBits == 3) return {kLanes, &Few, &Many, &FewTurned};
    return {kLanes, &Few, &Many, nullptr};
  }
  static constexpr LutKernel kKernel = Kernels();
};

template <class V>
const LutKernel* KernelOf(int bits) {
  switch (bits) {
    case 1: return &Kernel<V, 1>::kKernel;
    case 2: return &Kernel<V, 2>::kKernel;
    case 3: return &Kernel<V, 3>::kKernel;
    case 4: return &Kernel<V, 4>::kKernel;
    case 5: return &Kernel<V, 5>::kKernel;
    case 6: return &Kernel<V, 6>::kKernel;
    case 8: return &Kernel<V, 8>::kKernel;
    default: return nullptr;
  }
}
