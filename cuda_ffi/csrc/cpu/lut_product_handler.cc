// XLA's entry point to LutProducts: it checks what Python passed, and lends it XLA's threads.
#include <string>
#include <string_view>
#include <vector>

#include "handler.h"
#include "lut_kernel.h"
#include "lut_product.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using any4::HasShape;
using any4::IsFloat;
using any4::TypeOf;

ffi::Error Invalid(const std::string& message) {
  return ffi::Error::InvalidArgument("any4_cpu_lut_product: " + message);
}

// The operands of each matrix: codes, high, lut, scales, offsets. `high` and `offsets` without elements are absent.
constexpr size_t kOperands = 5;

ffi::ErrorOr<any4::LutWeight> WeightOf(const ffi::RemainingArgs& operands, size_t first, int64_t k, int bits,
                                       int64_t group_size) {
  const auto operand = [&](size_t i) { return *operands.get<ffi::AnyBuffer>(first + i); };
  const ffi::AnyBuffer codes = operand(0), high = operand(1), lut = operand(2), scales = operand(3),
                       offsets = operand(4);
  if (codes.dimensions().size() != 2 || lut.dimensions().size() != 2) {
    return ffi::Unexpected(Invalid("codes and lut need two axes"));
  }
  any4::LutWeight w{};
  w.n = codes.dimensions()[0];
  w.k = k;
  w.bits = bits;
  w.group_size = group_size;
  w.lut_rows = lut.dimensions()[0];
  const auto low_bits = any4::LowBits(bits), high_bits = any4::HighBits(bits);
  if (!HasShape(codes, w.n, any4::PlaneBytes(k, low_bits)) ||
      (high_bits > 0 && !HasShape(high, w.n, any4::PlaneBytes(k, high_bits))) ||
      !HasShape(lut, w.lut_rows == 1 ? 1 : w.n, int64_t{1} << bits) || !HasShape(scales, w.n, w.groups()) ||
      (offsets.element_count() > 0 && !HasShape(offsets, w.n, w.groups()))) {
    return ffi::Unexpected(Invalid("the shapes of its operands don't fit together"));
  }
  const auto lut_type = TypeOf(lut), scales_type = TypeOf(scales), offsets_type = TypeOf(offsets);
  if (!IsFloat(lut_type) || !scales_type || codes.element_type() != ffi::U8 ||
      (offsets.element_count() > 0 && !IsFloat(offsets_type))) {
    return ffi::Unexpected(Invalid("lut and offsets need float32 or bfloat16, scales these or uint8, codes uint8"));
  }
  w.codes = static_cast<const uint8_t*>(codes.untyped_data());
  w.high = static_cast<const uint8_t*>(high.untyped_data());
  w.lut = lut.untyped_data();
  w.lut_type = *lut_type;
  w.scales = scales.untyped_data();
  w.scales_type = *scales_type;
  w.offsets = offsets.element_count() > 0 ? offsets.untyped_data() : nullptr;
  w.offsets_type = offsets_type.value_or(any4::Type::kFloat32);
  return w;
}

ffi::Error Products(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs operands, ffi::RemainingRets results,
                    int64_t bits, int64_t group_size, std::string_view isa) {
  const auto chosen = any4::IsaNamed(isa);
  if (!chosen) return Invalid(any4::LacksIsa(isa));
  if (bits < 1 || bits > 8 || bits == 7) return Invalid("got bits=" + std::to_string(bits) + ", need 1 to 6 or 8");
  const auto x_type = TypeOf(x);
  if (x.dimensions().size() != 2 || !IsFloat(x_type) || group_size < 1) {
    return Invalid("x needs two axes and float32 or bfloat16, and group_size must be at least 1");
  }
  if (results.size() == 0 || operands.size() != kOperands * results.size()) {
    return Invalid("got " + std::to_string(operands.size()) + " operands, need 5 for each matrix");
  }
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1];
  std::vector<any4::Product> products;
  for (size_t i = 0; i < results.size(); ++i) {
    const auto weight = WeightOf(operands, i * kOperands, k, static_cast<int>(bits), group_size);
    if (weight.has_error()) return weight.error();
    const ffi::AnyBuffer y = **results.get<ffi::AnyBuffer>(i);
    if (!HasShape(y, m, weight->n) || TypeOf(y) != x_type) return Invalid("y needs the shape [M, N] and x's dtype");
    products.push_back({*weight, y.untyped_data()});
  }
  any4::LutProducts(products.data(), static_cast<int64_t>(products.size()), x.untyped_data(), m, *x_type, *chosen,
                    any4::ExecutorOf(pool));
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(any4_cpu_lut_product, Products,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group_size")
                                  .Attr<std::string_view>("isa"));
