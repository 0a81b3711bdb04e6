// What the handlers of products read of their operands, checked.
#pragma once

#include <string>
#include <vector>

#include "handler.h"
#include "weight.h"
#include "xla/ffi/api/ffi.h"

namespace any4 {

// The operands of each matrix: codes, high, lut, scales, offsets. `high` and `offsets` without elements are absent.
constexpr size_t kOperands = 5;

inline xla::ffi::Error InvalidProduct(const char* target, const std::string& message) {
  return xla::ffi::Error::InvalidArgument(std::string(target) + ": " + message);
}

inline xla::ffi::ErrorOr<Weight> WeightOf(const char* target, const xla::ffi::RemainingArgs& operands, size_t first,
                                          int64_t k, int bits, int64_t group_size) {
  using xla::ffi::AnyBuffer;
  const auto operand = [&](size_t i) { return *operands.get<AnyBuffer>(first + i); };
  const AnyBuffer codes = operand(0), high = operand(1), lut = operand(2), scales = operand(3), offsets = operand(4);
  if (codes.dimensions().size() != 2 || lut.dimensions().size() != 2) {
    return xla::ffi::Unexpected(InvalidProduct(target, "codes and lut need two axes"));
  }
  Weight w{};
  w.n = codes.dimensions()[0];
  w.k = k;
  w.bits = bits;
  w.group_size = group_size;
  w.lut_rows = lut.dimensions()[0];
  const auto low_bits = LowBits(bits), high_bits = HighBits(bits);
  const bool has_offsets = offsets.element_count() > 0;
  if (!HasShape(codes, w.n, PlaneBytes(k, low_bits)) ||
      (high_bits > 0 && !HasShape(high, w.n, PlaneBytes(k, high_bits))) ||
      !HasShape(lut, w.lut_rows == 1 ? 1 : w.n, int64_t{1} << bits) || !HasShape(scales, w.n, w.groups()) ||
      (has_offsets && !HasShape(offsets, w.n, w.groups()))) {
    return xla::ffi::Unexpected(InvalidProduct(target, "the shapes of its operands don't fit together"));
  }
  const auto lut_type = TypeOf(lut), scales_type = TypeOf(scales), offsets_type = TypeOf(offsets);
  w.integers = lut.element_type() == xla::ffi::S8;
  if ((!w.integers && !IsFloat(lut_type)) || !scales_type || codes.element_type() != xla::ffi::U8 ||
      (high_bits > 0 && high.element_type() != xla::ffi::U8) || (has_offsets && !IsFloat(offsets_type))) {
    return xla::ffi::Unexpected(InvalidProduct(
        target, "lut needs int8, float32 or bfloat16, offsets the latter two, scales these or uint8, codes uint8"));
  }
  w.codes = static_cast<const uint8_t*>(codes.untyped_data());
  w.high = static_cast<const uint8_t*>(high.untyped_data());
  w.lut = lut.untyped_data();
  w.lut_type = lut_type.value_or(Type::kFloat32);
  w.scales = scales.untyped_data();
  w.scales_type = *scales_type;
  w.offsets = has_offsets ? offsets.untyped_data() : nullptr;
  w.offsets_type = offsets_type.value_or(Type::kFloat32);
  return w;
}

// The products of x [M, K] with all matrices; bits and group_size are of all of them.
inline xla::ffi::ErrorOr<std::vector<Product>> ProductsOf(const char* target, const xla::ffi::AnyBuffer& x,
                                                          const xla::ffi::RemainingArgs& operands,
                                                          const xla::ffi::RemainingRets& results, int64_t bits,
                                                          int64_t group_size) {
  const auto refuse = [&](const std::string& message) {
    return xla::ffi::Unexpected(InvalidProduct(target, message));
  };
  if (bits < 1 || bits > 8 || bits == 7) return refuse("got bits=" + std::to_string(bits) + ", need 1 to 6 or 8");
  const auto x_type = TypeOf(x);
  if (x.dimensions().size() != 2 || !IsFloat(x_type) || group_size < 1) {
    return refuse("x needs two axes and float32 or bfloat16, and group_size must be at least 1");
  }
  if (results.size() == 0 || operands.size() != kOperands * results.size()) {
    return refuse("got " + std::to_string(operands.size()) + " operands, need 5 for each matrix");
  }
  std::vector<Product> products;
  for (size_t i = 0; i < results.size(); ++i) {
    const auto weight =
        WeightOf(target, operands, i * kOperands, x.dimensions()[1], static_cast<int>(bits), group_size);
    if (weight.has_error()) return xla::ffi::Unexpected(weight.error());
    const xla::ffi::AnyBuffer y = **results.get<xla::ffi::AnyBuffer>(i);
    if (!HasShape(y, x.dimensions()[0], weight->n) || TypeOf(y) != x_type) {
      return refuse("y needs the shape [M, N] and x's dtype");
    }
    products.push_back({*weight, y.untyped_data()});
  }
  return products;
}

}  // namespace any4
