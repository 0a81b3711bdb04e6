// XLA's way in to LutProduct: checks what Python passed, and lends it the threads of XLA's own pool, which are idle
// while a handler runs.
#include <algorithm>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "lut_kernel.h"
#include "lut_product.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

std::optional<any4::Type> TypeOf(const ffi::AnyBuffer& buffer) {
  switch (buffer.element_type()) {
    case ffi::F32: return any4::Type::kFloat32;
    case ffi::BF16: return any4::Type::kBfloat16;
    case ffi::U8: return any4::Type::kE8m0;
    default: return std::nullopt;
  }
}

bool HasShape(const ffi::AnyBuffer& buffer, int64_t rows, int64_t columns) {
  const auto dims = buffer.dimensions();
  return dims.size() == 2 && dims[0] == rows && dims[1] == columns;
}

ffi::Error Invalid(const std::string& message) {
  return ffi::Error::InvalidArgument("any4_cpu_lut_product: " + message);
}

// `high` and `offsets` of no elements stand for absent ones.
ffi::Error Product(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer codes, ffi::AnyBuffer high,
                   ffi::AnyBuffer lut, ffi::AnyBuffer scales, ffi::AnyBuffer offsets, ffi::Result<ffi::AnyBuffer> y,
                   int64_t bits, int64_t group_size, std::string_view isa) {
  const auto chosen = any4::IsaNamed(isa);
  if (!chosen) return Invalid("got isa=" + std::string(isa) + ", which this processor doesn't have; pass \"auto\"");
  if (bits < 1 || bits > 8 || bits == 7) return Invalid("got bits=" + std::to_string(bits) + ", need 1 to 6 or 8");
  if (x.dimensions().size() != 2 || codes.dimensions().size() != 2 || lut.dimensions().size() != 2 || group_size < 1) {
    return Invalid("x, codes and lut need two axes, and group_size at least 1");
  }
  any4::LutWeight w{};
  w.n = codes.dimensions()[0];
  w.k = x.dimensions()[1];
  w.bits = static_cast<int>(bits);
  w.group_size = group_size;
  w.lut_rows = lut.dimensions()[0];
  const int64_t m = x.dimensions()[0];
  const auto low_bits = any4::LowBits(w.bits), high_bits = any4::HighBits(w.bits);
  if (!HasShape(codes, w.n, any4::PlaneBytes(w.k, low_bits)) ||
      (high_bits > 0 && !HasShape(high, w.n, any4::PlaneBytes(w.k, high_bits))) ||
      !HasShape(lut, w.lut_rows == 1 ? 1 : w.n, int64_t{1} << bits) || !HasShape(scales, w.n, w.groups()) ||
      (offsets.element_count() > 0 && !HasShape(offsets, w.n, w.groups())) || !HasShape(*y, m, w.n)) {
    return Invalid("the shapes of its operands don't fit together");
  }
  const auto x_type = TypeOf(x), lut_type = TypeOf(lut), scales_type = TypeOf(scales), offsets_type = TypeOf(offsets);
  const auto is_float = [](std::optional<any4::Type> type) { return type && *type != any4::Type::kE8m0; };
  if (!is_float(x_type) || !is_float(lut_type) || !scales_type || TypeOf(*y) != x_type ||
      codes.element_type() != ffi::U8 || (offsets.element_count() > 0 && !is_float(offsets_type))) {
    return Invalid("x, lut and offsets need float32 or bfloat16, scales these or uint8, codes uint8");
  }
  w.codes = static_cast<const uint8_t*>(codes.untyped_data());
  w.high = static_cast<const uint8_t*>(high.untyped_data());
  w.lut = lut.untyped_data();
  w.lut_type = *lut_type;
  w.scales = scales.untyped_data();
  w.scales_type = *scales_type;
  w.offsets = offsets.element_count() > 0 ? offsets.untyped_data() : nullptr;
  w.offsets_type = offsets_type.value_or(any4::Type::kFloat32);

  any4::Executor executor;
  executor.threads = std::max<int64_t>(pool.num_threads(), 1);
  executor.spawn = [&pool](std::function<void()> task) { pool.Schedule(std::move(task)); };
  any4::LutProduct(w, x.untyped_data(), y->untyped_data(), m, *x_type, *chosen, executor);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(any4_cpu_lut_product, Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group_size")
                                  .Attr<std::string_view>("isa"));
