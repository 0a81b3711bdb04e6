// XLA's entry point to ByteProducts: it checks what Python passed, and lends it XLA's threads.
#include <string>
#include <string_view>

#include "byte_product.h"
#include "products_handler.h"

namespace {

namespace ffi = xla::ffi;

constexpr char kTarget[] = "any4_cpu_byte_product";

ffi::Error Products(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs operands, ffi::RemainingRets results,
                    int64_t bits, int64_t group_size, std::string_view isa) {
  const auto chosen = any4::IsaNamed(isa);
  if (!chosen) return any4::InvalidProduct(kTarget, any4::LacksIsa(isa));
  const auto products = any4::ProductsOf(kTarget, x, operands, results, bits, group_size);
  if (products.has_error()) return products.error();
  if (bits != 4 && bits != 8) {
    return any4::InvalidProduct(kTarget, "got bits=" + std::to_string(bits) + ", need 4 or 8");
  }
  for (const any4::Product& product : *products) {
    if (product.weight.integers && bits != 4) {
      return any4::InvalidProduct(kTarget, "lut is int8, and needs float32 or bfloat16 for 8 bits");
    }
  }
  if (group_size % any4::kGroup != 0 && group_size < x.dimensions()[1]) {
    return any4::InvalidProduct(
        kTarget, "got group_size=" + std::to_string(group_size) + ", need a multiple of 32, or K");
  }
  any4::ByteProducts(products->data(), static_cast<int64_t>(products->size()), x.untyped_data(), x.dimensions()[0],
                     *any4::TypeOf(x), *chosen, any4::ExecutorOf(pool));
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
