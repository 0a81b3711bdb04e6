// Sorts a few values.
#pragma once

#include <cstdint>

namespace any4 {
namespace {

inline void SortAscending(float* values, int64_t count) {
  for (int64_t i = 1; i < count; ++i) {
    const float value = values[i];
    int64_t place = i;
    for (; place > 0 && values[place - 1] > value; --place) values[place] = values[place - 1];
    values[place] = value;
  }
}

}  // namespace
}  // namespace any4
