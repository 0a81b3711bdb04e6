// A row of weights laid out for 16 lanes: each lane has a group, or a part of a group if the row has few.
//
// A block is 16 lanes of equally many steps; a row is one or more blocks. Lanes of a group hold the same scale and
// offset.
#pragma once

#include "lanes_inl.h"
#include "refit.h"
#include "scratch.h"

namespace any4 {
namespace {

struct Layout {
  int64_t inputs, group_size, groups;
  int64_t parts;  // lanes of a group: 1, 2, 4, 8 or 16
  int64_t steps;  // weights of a lane
  int64_t blocks;

  int64_t cells() const { return blocks * steps * kLanes; }
  int64_t lanes() const { return blocks * kLanes; }

  // Calls body(lane, group) for each lane of the row that has a group.
  template <class Body>
  void ForLanes(const Body& body) const {
    for (int64_t lane = 0; lane < groups * parts; ++lane) body(lane, lane / parts);
  }
};

inline Layout LayoutOf(const RefitOptions& options) {
  const int64_t groups = options.groups();
  int64_t parts = 1;
  while (2 * parts * groups <= kLanes) parts *= 2;
  return {options.inputs, options.group_size, groups, parts, (options.group_size + parts - 1) / parts,
          (groups * parts + kLanes - 1) / kLanes};
}

// Copies values [inputs] to [blocks, steps, 16], with zeros where a lane has no weight left.
inline void Lay(const Layout& layout, const float* values, float* laid) {
  __builtin_memset(laid, 0, layout.cells() * sizeof(float));
  layout.ForLanes([&](int64_t lane, int64_t group) {
    const int64_t begin = lane % layout.parts * layout.steps;
    const int64_t end = begin + layout.steps < layout.group_size ? begin + layout.steps : layout.group_size;
    const int64_t first = group * layout.group_size + begin;
    const int64_t rest = layout.inputs - first;
    const int64_t count = end - begin < rest ? end - begin : rest;
    float* const to = laid + lane / kLanes * layout.steps * kLanes + lane % kLanes;
    for (int64_t i = 0; i < count; ++i) to[i * kLanes] = values[first + i];
  });
}

// In each lane, the sum over the lanes of its group.
inline Floats SumParts(const Floats& lanes, int64_t parts) {
  if (parts == 1) return lanes;
  float values[kLanes];
  Store(values, lanes);
  for (int64_t begin = 0; begin < kLanes; begin += parts) {
    float sum = 0;
    for (int64_t i = begin; i < begin + parts; ++i) sum += values[i];
    for (int64_t i = begin; i < begin + parts; ++i) values[i] = sum;
  }
  return Load(values);
}

// What no fit changes in a block. Weights are kept as distances from the group's mean weight m under h.
struct Cells {
  const float* distance;  // w - m, [steps, 16]
  const float* h;         // [steps, 16]
  int64_t steps, parts;
  Floats mass, mean, spread;  // of each lane's group: sum h, m, sum h (w - m)^2
};

// The scale and offset of each lane's group.
struct Groups {
  Floats scale, offset;
};

// Turns laid out weights into distances from their means.
inline Cells CellsOf(const Layout& layout, float* w, const float* h) {
  Floats mass = All(0), pull = All(0);
  for (int64_t i = 0; i < layout.steps; ++i) {
    mass = mass + Load(h + i * kLanes);
    pull = pull + Load(h + i * kLanes) * Load(w + i * kLanes);
  }
  mass = SumParts(mass, layout.parts);
  const Ints empty = mass == All(0);
  const Floats mean = Where(empty, All(0), Divide(SumParts(pull, layout.parts), Where(empty, All(1), mass)));
  Floats spread = All(0);
  for (int64_t i = 0; i < layout.steps; ++i) {
    const Floats distance = Load(w + i * kLanes) - mean;
    Store(w + i * kLanes, distance);
    spread = spread + Load(h + i * kLanes) * (distance * distance);
  }
  return {w, h, layout.steps, layout.parts, mass, mean, SumParts(spread, layout.parts)};
}

}  // namespace
}  // namespace any4
