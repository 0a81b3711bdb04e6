// Scales and offsets of 16 lanes at a time, by least squares and by a search from several starts; groups.py and
// scale_search.py in any4_jax/refit have the formulas.
#pragma once

#include "refit_cells_inl.h"
#include "refit_nearest_inl.h"

namespace any4 {
namespace {

// Rounds to the nearest value of a dtype with so many bits of mantissa, ties to even, as XLA's ReducePrecision does:
// for float16, subnormals become zero and values that are too large infinite. Without a mantissa, to the nearest
// integer from -127 to 127.
inline Floats Rounded(const Floats& values, int64_t mantissa) {
  if (mantissa == 23) return values;
  if (mantissa == 0) {
    // Beside this number float32 holds integers alone.
    const Floats shift = All(0x1.8p23f);
    return Maximum(All(-127), Minimum(values, All(127))) + shift - shift;
  }
  const int shift = static_cast<int>(23 - mantissa);
  return Each<Floats>([&](int r) {
    IntRegister bits;
    __builtin_memcpy(&bits, &values.part[r], sizeof bits);
    bits = (bits + ((1 << (shift - 1)) - 1) + (bits >> shift & 1)) & -(1 << shift);
    if (mantissa == 10) {
      const IntRegister magnitude = bits & 0x7fffffff, sign = bits ^ magnitude;
      constexpr int32_t kSmallest = (127 - 14) << 23, kBeyond = (127 + 16) << 23, kInfinity = 255 << 23;
      bits = magnitude < kSmallest ? sign : magnitude < kBeyond ? bits : sign | kInfinity;
    }
    FloatRegister rounded;
    __builtin_memcpy(&rounded, &bits, sizeof rounded);
    return rounded;
  });
}

// Sums over the levels t of each lane's group: sum h t, sum h t^2, sum h t (w - m).
struct Moments {
  Floats t, tt, tw;
};

// Calls body(step, levels) for each step with the levels nearest to its 16 weights.
template <class Body>
inline __attribute__((always_inline)) void ForLevels(const Cells& cells, const Nearest& nearest, const Groups& groups,
                                                     const Body& body) {
  const Ints zero = groups.scale == All(0);
  const Floats inverse = Where(zero, All(0), Divide(All(1), Where(zero, All(1), groups.scale)));
  const Floats middle = (cells.mean - groups.offset) * inverse;
  for (int64_t i = 0; i < cells.steps; ++i) {
    body(i, nearest(Load(cells.distance + i * kLanes) * inverse + middle));
  }
}

inline Moments MomentsOf(const Cells& cells, const Nearest& nearest, const Groups& groups) {
  Moments sums{All(0), All(0), All(0)};
  ForLevels(cells, nearest, groups, [&](int64_t i, const Floats& level) {
    const Floats weighted = Load(cells.h + i * kLanes) * level;
    sums.t = sums.t + weighted;
    sums.tt = sums.tt + weighted * level;
    sums.tw = sums.tw + weighted * Load(cells.distance + i * kLanes);
  });
  return {SumParts(sums.t, cells.parts), SumParts(sums.tt, cells.parts), SumParts(sums.tw, cells.parts)};
}

// Each lane's part of its group's error.
inline Floats Errors(const Cells& cells, const Nearest& nearest, const Groups& groups) {
  Floats sum = All(0);
  const Floats shift = groups.offset - cells.mean;
  ForLevels(cells, nearest, groups, [&](int64_t i, const Floats& level) {
    const Floats gap = Load(cells.distance + i * kLanes) - (level * groups.scale + shift);
    sum = sum + Load(cells.h + i * kLanes) * (gap * gap);
  });
  return sum;
}

// The groups' errors, up to rounding by some 1e-5 of themselves.
inline Floats ErrorsFrom(const Cells& cells, const Moments& moments, const Groups& groups) {
  const Floats& s = groups.scale;
  const Floats o = groups.offset - cells.mean;
  return cells.spread + s * (s * moments.tt - All(2) * moments.tw) + o * (All(2) * s * moments.t + o * cells.mass);
}

// The scale and offset of least error for the levels, rounded. A group of a single level keeps its scale, and a group
// without importance its offset.
inline Groups LeastSquares(const Cells& cells, const Moments& moments, const Groups& old, const RefitOptions& options,
                           bool has_offsets) {
  const Ints empty = cells.mass == All(0);
  const Floats mean_level = Divide(moments.t, Where(empty, All(1), cells.mass));
  // Without offsets the sums are about zero, not about the mean: sum h t^2 and sum h t w.
  const Floats spread = has_offsets ? moments.tt - moments.t * mean_level : moments.tt;
  const Floats product = has_offsets ? moments.tw : moments.tw + cells.mean * moments.t;
  const Ints several = All(0) < spread;
  const Floats scale = Divide(product, Where(several, spread, All(1)));
  const Floats usable = Where(several, Where(All(0) < scale, scale, old.scale), old.scale);
  const Floats rounded = Rounded(usable, options.scale_mantissa);
  if (!has_offsets) return {rounded, old.offset};
  const Floats offset = Rounded(cells.mean - rounded * mean_level, options.offset_mantissa);
  return {rounded, Where(empty, old.offset, offset)};
}

// For each group the best of several fits, each from another scale.
inline Groups Search(const Cells& cells, const Nearest& nearest, const Groups& start, const RefitOptions& options,
                     bool has_offsets) {
  Floats lowest = All(__builtin_inff());
  Groups best = start;
  for (int64_t i = 0; i < options.starts; ++i) {
    Groups tried{Rounded(start.scale * All(options.factors[i]), options.scale_mantissa), start.offset};
    if (has_offsets) {
      const float still = nearest.first() + (nearest.last() - nearest.first()) * options.held[i];
      tried.offset = Rounded(start.offset + (start.scale - tried.scale) * All(still), options.offset_mantissa);
    }
    Floats error = lowest;
    for (int64_t fit = 0; fit < options.fits; ++fit) {
      const Moments moments = MomentsOf(cells, nearest, tried);
      tried = LeastSquares(cells, moments, tried, options, has_offsets);
      error = ErrorsFrom(cells, moments, tried);
    }
    const Ints better = error < lowest;
    lowest = Where(better, error, lowest);
    best.scale = Where(better, tried.scale, best.scale);
    best.offset = Where(better, tried.offset, best.offset);
  }
  return best;
}

}  // namespace
}  // namespace any4
