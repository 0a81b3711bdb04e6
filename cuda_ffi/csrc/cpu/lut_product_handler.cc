// XLA's entry point to LutProducts: it checks what Python passed, and lends it XLA's threads.
#include <string_view>

#include "lut_product.h"
#include "products_handler.h"

namespace {

namespace ffi = xla::ffi;

constexpr char kTarget[] = "any4_cpu_lut_product";

ffi::Error Products(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::RemainingArgs operands, ffi::RemainingRets results,
                    int64_t bits, int64_t group_size, std::string_view isa) {
  const auto chosen = any4::IsaNamed(isa);
  if (!chosen) return any4::InvalidProduct(kTarget, any4::LacksIsa(isa));
  const auto products = any4::ProductsOf(kTarget, x, operands, results, bits, group_size);
  if (products.has_error()) return products.error();
  for (const any4::Product& product : *products) {
    if (product.weight.integers) return any4::InvalidProduct(kTarget, "lut is int8, and needs float32 or bfloat16");
  }
  any4::LutProducts(products->data(), static_cast<int64_t>(products->size()), x.untyped_data(), x.dimensions()[0],
                    *any4::TypeOf(x), *chosen, any4::ExecutorOf(pool));
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
