// XLA's entry points to LutProducts, ByteProducts and BinaryProducts: they check what Python passed, and lend them XLA's
// threads. One file holds all, since the compiler spends most of its time on XLA's headers.
#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#include "byte_product.h"
#include "handler.h"
#include "lut_binary.h"
#include "lut_product.h"
#include "lut_turned.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using any4::HasShape;
using any4::HighBits;
using any4::IsFloat;
using any4::LowBits;
using any4::PlaneBytes;
using any4::Product;
using any4::Type;
using any4::TypeOf;
using any4::Weight;

constexpr char kLutProduct[] = "any4_cpu_lut_product", kByteProduct[] = "any4_cpu_byte_product",
               kBinaryProduct[] = "any4_cpu_binary_product", kCodedProduct[] = "any4_cpu_coded_product";

// The operands of each matrix: codes, high, lut, scales, offsets. `high` and `offsets` without elements are absent.
constexpr size_t kOperands = 5;

ffi::Error Invalid(const char* target, const std::string& message) {
  return ffi::Error::InvalidArgument(std::string(target) + ": " + message);
}

ffi::ErrorOr<Weight> WeightOf(const char* target, const ffi::RemainingArgs& operands, size_t first, int64_t k, int bits,
                              int64_t group_size, bool coded = false) {
  const auto operand = [&](size_t i) { return *operands.get<ffi::AnyBuffer>(first + i); };
  const ffi::AnyBuffer codes = operand(0), high = operand(1), lut = operand(2), scales = operand(3),
                       offsets = operand(4);
  if (codes.dimensions().size() != 2 || lut.dimensions().size() != 2) {
    return ffi::Unexpected(Invalid(target, "codes and lut need two axes"));
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
      !HasShape(lut, w.lut_rows == 1 ? 1 : w.n, int64_t{1} << bits) ||
      (coded ? scales.element_count() > 0 || has_offsets : !HasShape(scales, w.n, w.groups())) ||
      (has_offsets && !HasShape(offsets, w.n, w.groups()))) {
    return ffi::Unexpected(Invalid(target, "the shapes of its operands don't fit together"));
  }
  const auto lut_type = TypeOf(lut), scales_type = TypeOf(scales), offsets_type = TypeOf(offsets);
  w.integers = lut.element_type() == ffi::S8;
  if ((!w.integers && !IsFloat(lut_type)) || !scales_type || codes.element_type() != ffi::U8 ||
      (high_bits > 0 && high.element_type() != ffi::U8) || (has_offsets && !IsFloat(offsets_type))) {
    return ffi::Unexpected(Invalid(
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

// The products of x [M, K] with all matrices; bits and group_size are of all of them. Each result is of `planes`
// consecutive matrices, and is their y.
ffi::ErrorOr<std::vector<Product>> ProductsOf(const char* target, const ffi::AnyBuffer& x,
                                              const ffi::RemainingArgs& operands, const ffi::RemainingRets& results,
                                              int64_t bits, int64_t group_size, size_t planes = 1) {
  const auto refuse = [&](const std::string& message) { return ffi::Unexpected(Invalid(target, message)); };
  if (bits < 1 || bits > 8 || bits == 7) return refuse("got bits=" + std::to_string(bits) + ", need 1 to 6 or 8");
  const auto x_type = TypeOf(x);
  if (x.dimensions().size() != 2 || !IsFloat(x_type) || group_size < 1) {
    return refuse("x needs two axes and float32 or bfloat16, and group_size must be at least 1");
  }
  if (results.size() == 0 || operands.size() != kOperands * planes * results.size()) {
    return refuse("got " + std::to_string(operands.size()) + " operands, need 5 for each matrix");
  }
  std::vector<Product> products;
  for (size_t i = 0; i < planes * results.size(); ++i) {
    const auto weight =
        WeightOf(target, operands, i * kOperands, x.dimensions()[1], static_cast<int>(bits), group_size);
    if (weight.has_error()) return ffi::Unexpected(weight.error());
    const ffi::AnyBuffer y = **results.get<ffi::AnyBuffer>(i / planes);
    if (!HasShape(y, x.dimensions()[0], weight->n) || TypeOf(y) != x_type) {
      return refuse("y needs the shape [M, N] and x's dtype");
    }
    products.push_back({*weight, y.untyped_data()});
  }
  return products;
}

ffi::Error OfFloats(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs operands, ffi::RemainingRets results,
                    int64_t bits, int64_t group_size, std::string_view isa) {
  const auto chosen = any4::IsaNamed(isa);
  if (!chosen) return Invalid(kLutProduct, any4::LacksIsa(isa));
  const auto products = ProductsOf(kLutProduct, x, operands, results, bits, group_size);
  if (products.has_error()) return products.error();
  for (const Product& product : *products) {
    if (product.weight.integers) return Invalid(kLutProduct, "lut is int8, and needs float32 or bfloat16");
  }
  any4::LutProducts(products->data(), static_cast<int64_t>(products->size()), 1, x.untyped_data(), x.dimensions()[0],
                    *TypeOf(x), *chosen, any4::ExecutorOf(pool));
  return ffi::Error::Success();
}

// Scales or offsets [n, columns] from five operands: codes, high, lut, scales, offsets, coded in runs along n. The
// table is a ramp.
ffi::ErrorOr<any4::Turned> TurnedOf(const ffi::RemainingArgs& operands, size_t first, int64_t n, int64_t columns,
                                    int64_t run) {
  const auto operand = [&](size_t i) { return *operands.get<ffi::AnyBuffer>(first + i); };
  const ffi::AnyBuffer low = operand(0), high = operand(1), lut = operand(2), scales = operand(3),
                       offsets = operand(4);
  const auto levels = static_cast<int64_t>(lut.element_count());
  const int bits = levels == 16 ? 4 : levels == 8 ? 3 : levels == 4 ? 2 : 0;
  if (bits == 0 || run < any4::kTurnedChunk || run % any4::kTurnedChunk != 0) {
    return ffi::Unexpected(Invalid(kCodedProduct, "scales need codes of 2 to 4 bits, in runs of a multiple of 8"));
  }
  const bool two = HighBits(bits) > 0;
  const int64_t runs = (n + run - 1) / run;
  if (!HasShape(low, columns, PlaneBytes(n, LowBits(bits))) || low.element_type() != ffi::U8 ||
      (two && (!HasShape(high, columns, PlaneBytes(n, HighBits(bits))) || high.element_type() != ffi::U8)) ||
      !HasShape(scales, columns, runs) || !HasShape(offsets, columns, runs) || lut.element_type() != ffi::F32 ||
      !IsFloat(TypeOf(scales)) || TypeOf(offsets) != TypeOf(scales)) {
    return ffi::Unexpected(Invalid(kCodedProduct, "the operands of its scales don't fit together"));
  }
  const auto* levels_of = static_cast<const float*>(lut.untyped_data());
  return any4::Turned{n,
                      columns,
                      run,
                      bits,
                      static_cast<const uint8_t*>(low.untyped_data()),
                      two ? static_cast<const uint8_t*>(high.untyped_data()) : nullptr,
                      levels_of[0],
                      levels_of[1] - levels_of[0],
                      *TypeOf(scales),
                      scales.untyped_data(),
                      offsets.untyped_data()};
}

// One matrix, whose scales and offsets are coded: its operands without these, then five for each of the two. Without
// offsets there are but ten.
ffi::Error OfCoded(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs operands, ffi::RemainingRets results,
                   int64_t bits, int64_t group_size, int64_t scales_run, int64_t offsets_run, std::string_view isa) {
  const auto refuse = [](const std::string& message) { return Invalid(kCodedProduct, message); };
  const auto chosen = any4::IsaNamed(isa);
  if (!chosen) return refuse(any4::LacksIsa(isa));
  const auto x_type = TypeOf(x);
  const bool has_offsets = operands.size() == 3 * kOperands;
  if (bits < 1 || bits > 8 || bits == 7 || x.dimensions().size() != 2 || !IsFloat(x_type) || group_size < 1 ||
      results.size() != 1 || (operands.size() != 2 * kOperands && !has_offsets)) {
    return refuse("need x of two axes, 10 or 15 operands, bits from 1 to 6 or 8, and group_size of at least 1");
  }
  const int64_t m = x.dimensions()[0];
  const auto weight = WeightOf(kCodedProduct, operands, 0, x.dimensions()[1], static_cast<int>(bits), group_size, true);
  if (weight.has_error()) return weight.error();
  if (weight->integers) return refuse("lut is int8, and needs float32 or bfloat16");
  const ffi::AnyBuffer y = **results.get<ffi::AnyBuffer>(0);
  if (!HasShape(y, m, weight->n) || TypeOf(y) != x_type) return refuse("y needs the shape [M, N] and x's dtype");
  const auto scales = TurnedOf(operands, kOperands, weight->n, weight->groups(), scales_run);
  if (scales.has_error()) return scales.error();
  Product product{*weight, y.untyped_data()};
  product.weight.turned_scales = &*scales;
  const auto offsets = TurnedOf(operands, (has_offsets ? 2 : 1) * kOperands, weight->n, weight->groups(),
                                has_offsets ? offsets_run : scales_run);
  if (offsets.has_error()) return offsets.error();
  if (has_offsets) product.weight.turned_offsets = &*offsets;
  any4::LutProducts(&product, 1, 1, x.untyped_data(), m, *x_type, *chosen, any4::ExecutorOf(pool));
  return ffi::Error::Success();
}

ffi::Error OfBytes(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer grid, ffi::RemainingArgs operands,
                   ffi::RemainingRets results, int64_t bits, int64_t group_size, int64_t input_bits, bool by_row,
                   bool symmetric, std::string_view isa) {
  const auto refuse = [](const std::string& message) { return Invalid(kByteProduct, message); };
  const auto chosen = any4::IsaNamed(isa);
  if (!chosen) return refuse(any4::LacksIsa(isa));
  const auto products = ProductsOf(kByteProduct, x, operands, results, bits, group_size);
  if (products.has_error()) return products.error();
  for (const Product& product : *products) {
    if (product.weight.integers && bits > 4) return refuse("lut is int8, and needs float32 or bfloat16 beyond 4 bits");
  }
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1], multiple = by_row ? 8 : any4::kGroup;
  if (group_size < k && group_size % multiple != 0) {
    return refuse("got group_size=" + std::to_string(group_size) + ", need a multiple of " + std::to_string(multiple) +
                  ", or K");
  }
  if (input_bits < 2 || input_bits > 8 || (!by_row && (input_bits != 8 || !symmetric))) {
    return refuse("got input_bits=" + std::to_string(input_bits) + ", need 2 to 8; groups of inputs need 8, symmetric");
  }
  if (by_row && std::min(group_size, k) > any4::kLongestGroup) {
    return refuse("groups have " + std::to_string(group_size) + " weights, whose sums may not fit into 32 bits");
  }
  const int64_t given = grid.dimensions().size() == 2 ? grid.dimensions()[0] : -1;
  if ((given != 0 && given != 1 && given != m) || !HasShape(grid, given, 3) ||
      grid.element_type() != ffi::F32 || (given != 0 && !by_row)) {
    return refuse("grid needs the shape [0, 1 or M, 3] and float32, and rows of x with one scale");
  }
  const any4::Rounding rounding{by_row, static_cast<int>(input_bits), symmetric,
                                given == 0 ? nullptr : static_cast<const float*>(grid.untyped_data()), given};
  any4::ByteProducts(products->data(), static_cast<int64_t>(products->size()), x.untyped_data(), m, *TypeOf(x),
                     rounding, *chosen, any4::ExecutorOf(pool));
  return ffi::Error::Success();
}

ffi::Error OfPlanes(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs operands, ffi::RemainingRets results,
                    int64_t planes, int64_t group_size, bool tables, std::string_view isa) {
  const auto refuse = [](const std::string& message) { return Invalid(kBinaryProduct, message); };
  const auto chosen = any4::IsaNamed(isa);
  if (!chosen) return refuse(any4::LacksIsa(isa));
  if (planes < 1) return refuse("got planes=" + std::to_string(planes) + ", need at least 1");
  const auto products =
      ProductsOf(kBinaryProduct, x, operands, results, 1, group_size, static_cast<size_t>(planes));
  if (products.has_error()) return products.error();
  for (const Product& product : *products) {
    if (product.weight.integers) return refuse("lut is int8, and needs float32 or bfloat16");
  }
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1];
  if (tables && !any4::HasBinaryGroups(k, group_size)) {
    return refuse("got group_size=" + std::to_string(group_size) + ", need a multiple of 32 for tables, or K");
  }
  const auto multiply = tables ? &any4::BinaryProducts : &any4::LutProducts;
  multiply(products->data(), static_cast<int64_t>(results.size()), planes, x.untyped_data(), m, *TypeOf(x), *chosen,
           any4::ExecutorOf(pool));
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(any4_cpu_binary_product, OfPlanes,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("planes")
                                  .Attr<int64_t>("group_size")
                                  .Attr<bool>("tables")
                                  .Attr<std::string_view>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(any4_cpu_lut_product, OfFloats,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group_size")
                                  .Attr<std::string_view>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(any4_cpu_coded_product, OfCoded,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group_size")
                                  .Attr<int64_t>("scales_run")
                                  .Attr<int64_t>("offsets_run")
                                  .Attr<std::string_view>("isa"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(any4_cpu_byte_product, OfBytes,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .RemainingRets()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group_size")
                                  .Attr<int64_t>("input_bits")
                                  .Attr<bool>("by_row")
                                  .Attr<bool>("symmetric")
                                  .Attr<std::string_view>("isa"));
