// What the choice of a product's kernel depends on, apart from the device, the addresses and the rows of x. LutProducts
// asks when it launches, and Python asks through library.cc when it traces.
#pragma once

#include <cstdint>
#include <optional>

#include "lut_weight.h"

namespace any4 {

struct LutForm {
  int bits;
  int64_t group_size;
  int64_t n, k;
  Type type;  // of x
  Type scale_type;
  std::optional<Type> offset_type;  // none without offsets
};

LutForm FormOf(const LutWeight& w, int bits, int64_t group_size, Type type);

// Whether LutTurns has an instance for a weight.
bool IsForTurns(const LutForm& form);

// Whether LutWide has one.
bool IsForWide(const LutForm& form);

}  // namespace any4
