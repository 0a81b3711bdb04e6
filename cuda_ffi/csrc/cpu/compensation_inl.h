// Error compensation of 16 rows at a time, whose columns follow one another; each instruction set's file includes this
// one. Columns are taken in panels: what the errors before a panel add to its columns is summed for all of them at a
// time, in registers.
#pragma once

#include "compensation.h"
#include "lanes_inl.h"
#include "scratch.h"

namespace any4 {
namespace {

constexpr int kPanel = 8 / kRegisters;

// Up to 16 rows from `first` on. Lanes past the last row hold zeros.
struct Tile {
  int64_t first;
  int count;

  Floats Of(const float* rows) const {
    if (count == kLanes) return Load(rows + first);
    float values[kLanes] = {};
    __builtin_memcpy(values, rows + first, count * sizeof(float));
    return Load(values);
  }

  template <class T>
  void Put(T* rows, const T* values) const {
    if (count == kLanes) {
      __builtin_memcpy(rows + first, values, kLanes * sizeof(T));
    } else {
      __builtin_memcpy(rows + first, values, count * sizeof(T));
    }
  }
};

// The true quotient, on which ties depend; Divide's is nearly that.
inline Floats Quotient(const Floats& a, const Floats& b) {
  return Each<Floats>([&](int r) { return a.part[r] / b.part[r]; });
}

inline Ints Truncated(const Floats& values) {
  return Each<Ints>([&](int r) { return __builtin_convertvector(values.part[r], IntRegister); });
}

// The tables of a tile's rows.
class Tables {
 public:
  // thresholds: [levels - 1, 16], filled here unless the tables are ramps.
  Tables(const CompensationBlock& block, const Tile& tile, float* thresholds)
      : levels_(block.levels),
        uniform_(block.uniform),
        count_(tile.count),
        table_(block.table + tile.first * levels_),
        thresholds_(thresholds) {
    float first[kLanes] = {}, second[kLanes] = {};
    for (int lane = 0; lane < count_; ++lane) {
      first[lane] = table_[lane * levels_];
      second[lane] = table_[lane * levels_ + 1];
    }
    first_ = Load(first);
    step_ = Load(second) - first_;
    for (int64_t i = 0; !uniform_ && i + 1 < levels_; ++i) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t at = lane * levels_ + i;
        const float middle = lane < count_ ? (table_[at] + table_[at + 1]) / 2 : 0;
        // A value on a middle above zero is beyond it, which is to exceed the number before it.
        thresholds[i * kLanes + lane] = middle > 0 ? FloatOf(BitsOf(middle) - 1) : middle;
      }
    }
  }

  // The codes of the nearest entries; 0 for NaN.
  Ints Nearest(const Floats& values) const {
    if (uniform_) {
      const Floats steps = Quotient(values - first_, step_), zero = All(0);
      const Floats within = Minimum(Where(zero < steps, steps, zero), All(static_cast<float>(levels_ - 1)));
      // Numbers this large have no fraction: what is added and taken away again rounds half to even.
      return Truncated((within + All(0x1p23f)) - All(0x1p23f));
    }
    Ints codes = AllInts(0);
    for (int64_t i = 0; i + 1 < levels_; ++i) {
      const Ints beyond = Load(thresholds_ + i * kLanes) < values;
      codes = Each<Ints>([&](int r) { return codes.part[r] - beyond.part[r]; });
    }
    return codes;
  }

  Floats At(const int32_t* codes) const {
    float values[kLanes] = {};
    for (int lane = 0; lane < count_; ++lane) values[lane] = table_[lane * levels_ + codes[lane]];
    return Load(values);
  }

 private:
  int64_t levels_;
  bool uniform_;
  int count_;
  const float* table_;
  const float* thresholds_;
  Floats first_, step_;
};

// Adds what an error adds to the columns of a panel: sums[i] += row[i] * error.
template <int kColumns>
inline __attribute__((always_inline)) void AddTo(Floats* sums, const float* row, const Floats& error) {
  for (int i = 0; i < kColumns; ++i) sums[i] = sums[i] + All(row[i]) * error;
}

// One panel of `kColumns` columns from `first` on. errors: [columns, 16], those before `first` are known.
template <int kColumns>
inline void Panel(const CompensationBlock& block, const Tile& tile, const Tables& tables, int64_t first,
                  float* errors) {
  Floats sums[kColumns];
  for (int i = 0; i < kColumns; ++i) sums[i] = All(0);
  for (int64_t j = 0; j < first; ++j) {
    AddTo<kColumns>(sums, block.corner + j * block.columns + first, Load(errors + j * kLanes));
  }
  for (int i = 0; i < kColumns; ++i) {
    const int64_t column = first + i, at = column * block.rows;
    const Floats value = tile.Of(block.wanted + at) + sums[i], scale = tile.Of(block.scales + at);
    const Floats offset = block.offsets == nullptr ? All(0) : tile.Of(block.offsets + at);
    const Ints none = scale == All(0);
    const Floats u = Where(none, All(0), Quotient(value - offset, Where(none, All(1), scale)));
    int32_t codes[kLanes];
    uint8_t bytes[kLanes];
    Store(codes, tables.Nearest(u));
    for (int lane = 0; lane < kLanes; ++lane) bytes[lane] = static_cast<uint8_t>(codes[lane]);
    tile.Put(block.codes + at, bytes);
    const Floats error = tile.Of(block.own + at) - (tables.At(codes) * scale + offset);
    Store(errors + column * kLanes, error);
    tile.Put(block.errors + at, errors + column * kLanes);
    for (int k = i + 1; k < kColumns; ++k) {
      sums[k] = sums[k] + All(block.corner[column * block.columns + first + k]) * error;
    }
  }
}

struct CompensationSpace {
  float* errors;      // [columns, 16]
  float* thresholds;  // [levels, 16]

  CompensationSpace(const CompensationBlock& block, Scratch& scratch)
      : errors(scratch.Take<float>(block.columns * kLanes)), thresholds(scratch.Take<float>(block.levels * kLanes)) {}
};

inline int64_t CompensationBytes(const CompensationBlock& block) {
  Scratch scratch(nullptr);
  CompensationSpace(block, scratch);
  return scratch.used();
}

inline void CompensateTiles(const CompensationBlock& block, int64_t begin, int64_t end, char* memory) {
  Scratch scratch(memory);
  const CompensationSpace space(block, scratch);
  for (int64_t t = begin; t < end; ++t) {
    const int64_t rest = block.rows - t * kLanes;
    const Tile tile{t * kLanes, rest < kLanes ? static_cast<int>(rest) : kLanes};
    const Tables tables(block, tile, space.thresholds);
    int64_t first = 0;
    for (; first + kPanel <= block.columns; first += kPanel) Panel<kPanel>(block, tile, tables, first, space.errors);
    for (; first < block.columns; ++first) Panel<1>(block, tile, tables, first, space.errors);
  }
}

constexpr CompensationKernel kKernel{kLanes, CompensationBytes, CompensateTiles};

}  // namespace
}  // namespace any4
