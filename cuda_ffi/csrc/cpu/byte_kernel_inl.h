// The kernel, over a vector type V. Each instruction set's file includes this one inside its own namespace, so that the
// linker never merges code of different sets. For the same reason it calls nothing of the standard library.
//
// Of V the kernel needs kLanes lanes of 32 bits in Ints and Floats, Bytes of 4 kLanes, and
//   kUnsigned                  whether weights are value + 128, bytes without a sign, else bytes with one
//   kRowsOfOne                 rows of the weight at a time for one row of x, where latency limits
//   kRows, kInputs             those of the weight and of x at a time, where there are more of x
//   Dot(sum, weights, q)       adds to each lane the products of its 4 bytes
//   Table, Low, High           a table of 16 bytes, and the halves of a vector of codes that it looks up
//   Whole(at, low, high)       two vectors of codes of 8 bits in the order of byte_kernel.h
//   kReadsStored               whether it has what byte_stored_inl.h asks for
// and what byte_round_inl.h calls.

#include "numbers_inl.h"
#include "byte_codes_inl.h"
#include "byte_rows_inl.h"
#include "byte_round_inl.h"
#include "byte_stored_inl.h"
#include "byte_many_inl.h"
#include "byte_token_inl.h"
#include "byte_token_round_inl.h"

// kRows rows of the weight by kInputs rows of x at a time, over all steps of a row. Codes of other widths than 4 and 8
// bits are unpacked to one of these before.
template <class V, int kBits, bool kWhole>
struct ByteMultiply {
  using Bytes = typename V::Bytes;
  using Floats = typename V::Floats;
  static constexpr int64_t kLanes = V::kLanes, kStep = 8 * kLanes, kStepBytes = kLanes * kBits;
  // Codes are prefetched a page ahead, since the processor's own prefetching ends there.
  static constexpr int64_t kAhead = 4096;

  // Adds the products of one step to the sums.
  template <int kRows, int kInputs>
  static inline __attribute__((always_inline)) void Step(const ByteInput& in, int64_t input, int64_t step,
                                                         const uint8_t* const* codes, const typename V::Table* tables,
                                                         const float* const* scales, Floats (&sums)[kRows][kInputs]) {
    const int64_t at = input * in.steps + step;
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
      const int64_t of_input = at + i * in.steps;
      const Bytes q_low = V::Load(in.values + of_input * kStep);
      const Bytes q_high = V::Load(in.values + of_input * kStep + kStep / 2);
      const Floats by = V::LoadFloats(in.scales + of_input * kLanes);
      for (int r = 0; r < kRows; ++r) {
        const auto start = V::kUnsigned ? V::LoadInts(in.starts + of_input * kLanes) : V::Zero();
        const auto dot = V::Dot(V::Dot(start, low[r], q_low), high[r], q_high);
        sums[r][i] = V::Fma(V::ToFloats(dot), V::Multiply(by, scale[r]), sums[r][i]);
      }
    }
  }

  // kRows rows of the weight from n on, which is `within` those unpacked and whose tables are loaded, by kInputs rows of x.
  template <int kRows, int kInputs>
  static inline void Tile(const Weight& w, const ByteInput& in, const ByteRows& rows, const uint8_t* unpacked, int64_t n,
                          int64_t within, int64_t input, const Output& out) {
    if constexpr (V::kReadsStored) {
      const int64_t stride = unpacked != nullptr ? in.steps * kStepBytes : PlaneBytes(w.k, kBits);
      const uint8_t* const codes = unpacked != nullptr ? unpacked + within * stride : w.codes + n * stride;
      const bool direct = HasTables(w);
      const int8_t* const stored = static_cast<const int8_t*>(w.lut);
      const int8_t* const values = direct ? stored + (w.lut_rows == 1 ? 0 : n * 16) : rows.tables[within];
      const int64_t values_stride = direct && w.lut_rows == 1 ? 0 : 16;
      // Whole steps end beyond the weight's own bytes.
      const bool ends = unpacked == nullptr && (w.n - n - kRows) * stride < in.steps * kStepBytes - stride;
      const auto multiply = ends ? StoredTile<V, kBits>::template Multiply<kRows, kInputs, true>
                                 : StoredTile<V, kBits>::template Multiply<kRows, kInputs, false>;
      multiply(w, in, codes, stride, values, values_stride, n, input, out);
    } else {
      WidenedTile<kRows, kInputs>(w, in, rows, unpacked, n, within, input, out);
    }
  }

  // The same for scales and offsets that were widened into memory.
  template <int kRows, int kInputs>
  static void WidenedTile(const Weight& w, const ByteInput& in, const ByteRows& rows, const uint8_t* unpacked, int64_t n,
                          int64_t within, int64_t input, const Output& out) {
    typename V::Table tables[kRows];
    const float* scales[kRows];
    Floats sums[kRows][kInputs];
    for (int r = 0; r < kRows; ++r) {
      if constexpr (kBits == 4) tables[r].Set(rows.tables[within + r]);
      scales[r] = rows.scales + (within + r) * in.groups;
      for (Floats& sum : sums[r]) sum = V::ZeroFloats();
    }
    const uint8_t* codes[kRows];
    const int64_t stride = unpacked != nullptr ? in.steps * kStepBytes : PlaneBytes(w.k, kBits);
    const int64_t last_step = in.steps - 1;
    for (int r = 0; r < kRows; ++r) {
      codes[r] = unpacked != nullptr ? unpacked + (within + r) * stride : w.codes + (n + r) * stride;
    }
    for (int64_t step = 0; step < last_step; ++step) {
      if (kInputs == 1) {
        for (int r = 0; r < kRows; ++r) __builtin_prefetch(codes[r] + kAhead);
      }
      Step<kRows, kInputs>(in, input, step, codes, tables, scales, sums);
      for (int r = 0; r < kRows; ++r) codes[r] += kStepBytes;
    }
    // Vector loads read whole steps: after a row come the next row's bytes, which do no harm, since x has zeros there.
    // After the last row no bytes may be read, so its own are copied.
    uint8_t last[kRows][kStepBytes];
    const int64_t left = stride - last_step * kStepBytes;
    if (n + kRows >= w.n - kStepBytes && left < kStepBytes) {
      for (int r = 0; r < kRows; ++r) {
        __builtin_memset(last[r], 0, kStepBytes);
        __builtin_memcpy(last[r], codes[r], left);
        codes[r] = last[r];
      }
    }
    Step<kRows, kInputs>(in, input, last_step, codes, tables, scales, sums);
    for (int r = 0; r < kRows; ++r) {
      for (int i = 0; i < kInputs; ++i) {
        Floats sum = sums[r][i];
        if (rows.any_offsets) {
          sum = AddOffsets<V>(sum, rows.offsets + (within + r) * in.groups, in.sums + (input + i) * in.groups, in.groups);
        }
        Store(out, input + i, n + r, V::Sum(sum));
      }
    }
  }

  // Rows [first, first + count) of the weight by kInputs rows of x, as many of the weight at a time as registers allow.
  template <int kRows, int kInputs>
  static void Tiles(const Weight& w, const ByteInput& in, const ByteRows& rows, const uint8_t* unpacked, int64_t first,
                    int64_t count, int64_t input, const Output& out) {
    int64_t r = 0;
    for (; r + kRows <= count; r += kRows) Tile<kRows, kInputs>(w, in, rows, unpacked, first + r, r, input, out);
    for (; r < count; ++r) Tile<1, kInputs>(w, in, rows, unpacked, first + r, r, input, out);
  }

  // All rows of x from `input` on, kInputs at a time, then fewer.
  template <int kInputs>
  static void Inputs(const Weight& w, const ByteInput& in, const ByteRows& rows, const uint8_t* unpacked, int64_t first,
                     int64_t count, int64_t input, const Output& out) {
    constexpr int kRows = kInputs == 1 ? V::kRowsOfOne : V::kRows;
    for (; input + kInputs <= in.rows; input += kInputs) Tiles<kRows, kInputs>(w, in, rows, unpacked, first, count, input, out);
    if constexpr (kInputs > 1) {
      if (input < in.rows) Inputs<kInputs / 2>(w, in, rows, unpacked, first, count, input, out);
    }
  }

  static void Range(const Weight& w, const ByteInput& in, int64_t begin, int64_t end, const Output& out,
                    char* scratch) {
    if constexpr (V::kReadsStored) {
      if (in.rows >= kManyInputs) return ManyMultiply<V, kBits>::Range(w, in, begin, end, out, scratch);
    }
    uint8_t* const unpacked = w.bits == kBits ? nullptr : reinterpret_cast<uint8_t*>(scratch);
    ByteRows rows(w, reinterpret_cast<float*>(scratch + (unpacked ? kByteRows * in.steps * kStepBytes : 0)));
    for (int64_t first = begin; first < end; first += kByteRows) {
      const int64_t count = end - first < kByteRows ? end - first : kByteRows;
      if (!V::kReadsStored || !HasTables(w)) rows.LoadTables(w, first, count);
      if constexpr (!V::kReadsStored) rows.LoadScales(w, first, count);
      for (int64_t r = 0; unpacked != nullptr && r < count; ++r) {
        UnpackRow<kBits>(w, first + r, in.steps * kStepBytes, unpacked + r * in.steps * kStepBytes);
      }
      Inputs<V::kInputs>(w, in, rows, unpacked, first, count, 0, out);
    }
  }
};

template <class V>
struct ByteKernelOf {
  static void Round(const void* x, Type type, int bits, const ByteInput& in, int64_t row) {
    (ByteWidth(bits) == 4 ? RoundRow<V, 4> : RoundRow<V, 8>)(x, type, in, row);
  }

  static void Multiply(const Weight& w, const ByteInput& in, int64_t begin, int64_t end, const Output& out,
                       char* scratch) {
    const bool whole = !V::kReadsStored && in.whole_steps;
    const auto range = ByteWidth(w.bits) == 4
                           ? (whole ? ByteMultiply<V, 4, true>::Range : ByteMultiply<V, 4, false>::Range)
                           : (whole ? ByteMultiply<V, 8, true>::Range : ByteMultiply<V, 8, false>::Range);
    range(w, in, begin, end, out, scratch);
  }

  static const ByteKernel* Get() {
    static const ByteKernel kernel{
        V::kLanes, V::kReadsStored, Round, Multiply, sizeof(typename V::TokenWeight), RoundToken<V>, TokenMultiply<V>::Range};
    return &kernel;
  }
};
