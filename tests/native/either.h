// For the drivers of the C++ kernels: arrays of either dtype that end where their numbers end, and runs over both.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#include "numbers.h"
#include "pool.h"

// So many numbers, all `value` but those that `holds` refuses, which are NaN.
class Numbers {
 public:
  Numbers(any4::Type type, int64_t count, float value,
          const std::function<bool(int64_t)>& holds = [](int64_t) { return true; })
      : wide_(type == any4::Type::kFloat32 ? count : 0), narrow_(type == any4::Type::kFloat32 ? 0 : count) {
    for (int64_t i = 0; i < count; ++i) {
      const float number = holds(i) ? value : std::nanf("");
      uint32_t bits;
      std::memcpy(&bits, &number, sizeof bits);
      narrow_.empty() ? void(wide_[i] = number) : void(narrow_[i] = static_cast<uint16_t>(bits >> 16));
    }
  }
  const void* data() const { return narrow_.empty() ? static_cast<const void*>(wide_.data()) : narrow_.data(); }
  void* data() { return narrow_.empty() ? static_cast<void*>(wide_.data()) : narrow_.data(); }
  float at(int64_t i) const {
    if (narrow_.empty()) return wide_[i];
    const uint32_t bits = uint32_t{narrow_[i]} << 16;
    float number;
    std::memcpy(&number, &bits, sizeof number);
    return number;
  }

 private:
  std::vector<float> wide_;
  std::vector<uint16_t> narrow_;
};

// Whether a row's mixture is all ones, and the rest, which belongs to padding, zeros.
inline bool IsMixed(const Numbers& mixed, int64_t row, int64_t count, int64_t size, int own) {
  for (int64_t i = 0; i < count; ++i) {
    if (std::fabs(mixed.at(i) - (i < row ? 1 : 0)) < 1e-5f) continue;
    std::printf("size=%ld own=%d: number %ld is %f\n", long(size), own, long(i), double{mixed.at(i)});
    return false;
  }
  return true;
}

// check(case, instruction set, dtype, threads) of each case; prints their number. It is what `main` returns.
template <typename Case, size_t kCount, typename Check>
int CheckAll(const Case (&cases)[kCount], const Check& check) {
  int done = 0;
  for (const any4::Isa isa : InstructionSets()) {
    for (const Case& c : cases) {
      for (const any4::Type type : {any4::Type::kFloat32, any4::Type::kBfloat16}) {
        if (!check(c, isa, type, 1 + done % 3)) return EXIT_FAILURE;
        ++done;
      }
    }
  }
  std::printf("%d cases\n", done);
  return EXIT_SUCCESS;
}
