// The types of stored numbers, and where a product's results go.
#pragma once

#include <cstdint>

namespace any4 {

// kE8m0 is a biased exponent in a byte; only scales have it.
enum class Type { kFloat32, kBfloat16, kE8m0 };

struct Output {
  void* y;
  int64_t stride;
  Type type;  // float32 or bf16
};

}  // namespace any4
