// XLA's entry point to ByteProducts: it checks what Python passed, and lends it XLA's threads.
#include <string>
#include <string_view>
#include <vector>

#include "byte_kernel.h"
#include "byte_product.h"
#include "handler.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using any4::HasShape;
using any4::IsFloat;
using any4::TypeOf;

ffi::Error Invalid(const std::string& message) {
  return ffi::Error::InvalidArgument("any4_cpu_byte_product: " + message);
}

// The operands of each matrix: codes, lut, scales, offsets. `offsets` without elements are absent.
constexpr size_t kOperands = 4;

ffi::ErrorOr<any4::ByteWeight> WeightOf(const ffi::RemainingArgs& operands, size_t first, int64_t k, int bits,
                                        int64_t group_size) {
  const auto operand = [&](size_t i) { return *operands.get<ffi::AnyBuffer>(first + i); };
  const ffi::AnyBuffer codes = operand(0), lut = operand(1), scales = operand(2), offsets = operand(3);
  if (codes.dimensions().size() != 2 || lut.dimensions().size() != 2) {
    return ffi::Unexpected(Invalid("codes and lut need two axes"));
  }
  any4::ByteWeight w{};
  w.n = codes.dimensions()[0];
  w.k = k;
  w.bits = bits;
  w.group_size = group_size;
  w.lut_rows = lut.dimensions()[0];
  const bool has_offsets = offsets.element_count() > 0;
  if (!HasShape(codes, w.n, any4::CodeBytes(k, bits)) ||
      !HasShape(lut, w.lut_rows == 1 ? 1 : w.n, int64_t{1} << bits) || !HasShape(scales, w.n, w.groups()) ||
      (has_offsets && !HasShape(offsets, w.n, w.groups()))) {
    return ffi::Unexpected(Invalid("the shapes of its operands don't fit together"));
  }
  const auto lut_type = TypeOf(lut), scales_type = TypeOf(scales), offsets_type = TypeOf(offsets);
  w.ramp = IsFloat(lut_type);
  if ((!w.ramp && (lut.element_type() != ffi::S8 || bits != 4)) || !scales_type || codes.element_type() != ffi::U8 ||
      (has_offsets && !IsFloat(offsets_type))) {
    return ffi::Unexpected(Invalid("lut needs int8 of 16 entries, or a ramp of float32 or bfloat16, offsets the latter, "
                                   "scales these or uint8, codes uint8"));
  }
  w.codes = static_cast<const uint8_t*>(codes.untyped_data());
  w.lut = lut.untyped_data();
  w.lut_type = lut_type.value_or(any4::Type::kFloat32);
  w.scales = scales.untyped_data();
  w.scales_type = *scales_type;
  w.offsets = has_offsets ? offsets.untyped_data() : nullptr;
  w.offsets_type = offsets_type.value_or(any4::Type::kFloat32);
  return w;
}

ffi::Error Products(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs operands, ffi::RemainingRets results,
                    int64_t bits, int64_t group_size, std::string_view isa) {
  const auto chosen = any4::IsaNamed(isa);
  if (!chosen) return Invalid(any4::LacksIsa(isa));
  if (bits != 4 && bits != 8) return Invalid("got bits=" + std::to_string(bits) + ", need 4 or 8");
  const auto x_type = TypeOf(x);
  if (x.dimensions().size() != 2 || !IsFloat(x_type)) return Invalid("x needs two axes and float32 or bfloat16");
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1];
  if (group_size < 1 || (group_size % any4::kGroup != 0 && group_size < k)) {
    return Invalid("got group_size=" + std::to_string(group_size) + ", need a multiple of 32, or K");
  }
  if (results.size() == 0 || operands.size() != kOperands * results.size()) {
    return Invalid("got " + std::to_string(operands.size()) + " operands, need 4 for each matrix");
  }
  std::vector<any4::ByteProduct> products;
  for (size_t i = 0; i < results.size(); ++i) {
    const auto weight = WeightOf(operands, i * kOperands, k, static_cast<int>(bits), group_size);
    if (weight.has_error()) return weight.error();
    const ffi::AnyBuffer y = **results.get<ffi::AnyBuffer>(i);
    if (!HasShape(y, m, weight->n) || TypeOf(y) != x_type) return Invalid("y needs the shape [M, N] and x's dtype");
    products.push_back({*weight, y.untyped_data()});
  }
  any4::ByteProducts(products.data(), static_cast<int64_t>(products.size()), x.untyped_data(), m, *x_type, *chosen,
                     any4::ExecutorOf(pool));
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(any4_cpu_byte_product, Products,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group_size")
                                  .Attr<std::string_view>("isa"));
