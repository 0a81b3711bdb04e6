// The rounds of one row; included by the file of each instruction set. any4_jax/refit/xla.py has the same.
#pragma once

#include "refit_groups_inl.h"
#include "sort_inl.h"

namespace any4 {
namespace {

// The scales and offsets of a row's lanes, [blocks, 16].
struct RowGroups {
  float *scales, *offsets;

  RowGroups(const Layout& layout, Scratch& scratch)
      : scales(scratch.Take<float>(layout.lanes())), offsets(scratch.Take<float>(layout.lanes())) {}

  Groups operator[](int64_t block) const { return {Load(scales + block * kLanes), Load(offsets + block * kLanes)}; }
  void Set(int64_t block, const Groups& groups) const {
    Store(scales + block * kLanes, groups.scale);
    Store(offsets + block * kLanes, groups.offset);
  }
};

// What a row is worked on in.
struct Workspace {
  float* h;       // the importance, laid out for all rows
  float* w;       // the row, laid out
  float* levels;  // of one block
  Cells* cells;   // [blocks]
  RowGroups groups, tried;

  Workspace(const Layout& layout, Scratch& scratch)
      : h(scratch.Take<float>(layout.cells())),
        w(scratch.Take<float>(layout.cells())),
        levels(scratch.Take<float>(layout.steps * kLanes)),
        cells(scratch.Take<Cells>(layout.blocks)),
        groups(layout, scratch),
        tried(layout, scratch) {}
};

inline double ErrorOf(const Layout& layout, const Cells* cells, const Nearest& nearest, const RowGroups& groups) {
  double error = 0;
  for (int64_t b = 0; b < layout.blocks; ++b) error += SumOf(Errors(cells[b], nearest, groups[b]));
  return error;
}

// Entries whose sums are made at a time: sums of one would wait for each other's additions, more don't fit in registers.
constexpr int kTogether = kRegisters == 1 ? 4 : 2;

// Each free entry's weighted least-squares value over the weights that use it, rounded, where it is better; ascending.
inline void FitTable(const Layout& layout, const Workspace& space, const RefitOptions& options, const float* table,
                     float* fitted) {
  const Nearest nearest(table, options.entries);
  double mass[kMaxEntries] = {}, pull[kMaxEntries] = {};
  for (int64_t b = 0; b < layout.blocks; ++b) {
    const Cells& cells = space.cells[b];
    const Groups groups = space.tried[b];
    ForLevels(cells, nearest, groups, [&](int64_t i, const Floats& level) { Store(space.levels + i * kLanes, level); });
    const Floats &s = groups.scale, shift = groups.offset - cells.mean;
    for (int64_t first = options.first; first < options.stop; first += kTogether) {
      Floats entry[kTogether], share[kTogether], moved[kTogether];
      for (int j = 0; j < kTogether; ++j) {
        // Entries that are equal are one level: all its weights move with each of them. None is at NaN.
        entry[j] = All(first + j < options.stop ? table[first + j] : __builtin_nanf(""));
        share[j] = moved[j] = All(0);
      }
      for (int64_t i = 0; i < cells.steps; ++i) {
        const Floats level = Load(space.levels + i * kLanes), h = Load(cells.h + i * kLanes);
        const Floats distance = Load(cells.distance + i * kLanes);
        for (int j = 0; j < kTogether; ++j) {
          const Floats used = Where(level == entry[j], h, All(0));
          share[j] = share[j] + used;
          moved[j] = moved[j] + used * distance;
        }
      }
      for (int j = 0; j < kTogether && first + j < options.stop; ++j) {
        mass[first + j] += SumOf(s * s * share[j]);
        pull[first + j] += SumOf(s * (moved[j] - shift * share[j]));
      }
    }
  }
  for (int64_t e = 0; e < options.entries; ++e) {
    fitted[e] = table[e];
    if (mass[e] == 0) continue;
    float values[kLanes];
    Store(values, Rounded(All(static_cast<float>(pull[e] / mass[e])), options.table_mantissa));
    const double old = table[e], value = values[0];
    if (mass[e] * (value + old) * (value - old) - 2 * pull[e] * (value - old) < 0) fitted[e] = values[0];
  }
  SortAscending(fitted, options.entries);
}

inline void RefitRow(const Layout& layout, const Workspace& space, const RefitOptions& options, bool has_offsets,
                     float* table) {
  double noise = 0;
  for (int64_t b = 0; b < layout.blocks; ++b) {
    const Cells& cells = space.cells[b];
    noise += SumOf(cells.spread + cells.mass * cells.mean * cells.mean) / static_cast<double>(layout.parts);
  }
  double before = ErrorOf(layout, space.cells, Nearest(table, options.entries), space.groups);
  // What is left of a row that the start holds exactly: float32 knows weights to 2^-24 of themselves.
  bool active = before > noise * 0x1p-44;
  for (int64_t round = 0; round < options.max_rounds && active; ++round) {
    const Nearest nearest(table, options.entries);
    for (int64_t b = 0; b < layout.blocks; ++b) {
      const Groups groups = space.groups[b];
      space.tried.Set(b, round < options.searches ? Search(space.cells[b], nearest, groups, options, has_offsets)
                                                  : groups);
    }
    float fitted[kMaxEntries];
    FitTable(layout, space, options, table, fitted);
    const Nearest refitted(fitted, options.entries);
    for (int64_t b = 0; b < layout.blocks; ++b) {
      const Cells& cells = space.cells[b];
      const Groups groups = space.tried[b];
      space.tried.Set(b, LeastSquares(cells, MomentsOf(cells, refitted, groups), groups, options, has_offsets));
    }
    const double after = ErrorOf(layout, space.cells, refitted, space.tried);
    if (!(after < before)) return;
    __builtin_memcpy(table, fitted, options.entries * sizeof(float));
    for (int64_t b = 0; b < layout.blocks; ++b) space.groups.Set(b, space.tried[b]);
    active = before - after > options.settled * before || round + 1 < options.searches;
    before = after;
  }
}

inline int64_t ScratchBytes(const RefitOptions& options) {
  Scratch scratch(nullptr);
  Workspace(LayoutOf(options), scratch);
  return scratch.used();
}

inline void Refit(const RefitRows& rows, const RefitOptions& options, char* memory) {
  Scratch scratch(memory);
  const Layout layout = LayoutOf(options);
  const Workspace space(layout, scratch);
  Lay(layout, rows.importance, space.h);
  for (int64_t r = 0; r < rows.count; ++r) {
    Lay(layout, rows.weights + r * layout.inputs, space.w);
    float* const scales = rows.scales + r * layout.groups;
    float* const offsets = rows.offsets == nullptr ? nullptr : rows.offsets + r * layout.groups;
    for (int64_t b = 0; b < layout.blocks; ++b) {
      const int64_t begin = b * layout.steps * kLanes;
      space.cells[b] = CellsOf(layout, space.w + begin, space.h + begin);
      // Lanes without a group keep these, of which nothing becomes infinite.
      space.groups.Set(b, {All(1), All(0)});
    }
    layout.ForLanes([&](int64_t lane, int64_t group) {
      space.groups.scales[lane] = scales[group];
      if (offsets != nullptr) space.groups.offsets[lane] = offsets[group];
    });
    RefitRow(layout, space, options, offsets != nullptr, rows.tables + r * options.entries);
    layout.ForLanes([&](int64_t lane, int64_t group) {
      scales[group] = space.groups.scales[lane];
      if (offsets != nullptr) offsets[group] = space.groups.offsets[lane];
    });
  }
}

constexpr RefitKernel kKernel{ScratchBytes, Refit};

}  // namespace
}  // namespace any4
