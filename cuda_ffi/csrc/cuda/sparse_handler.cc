// XLA's entry point to SparseProduct: it checks what Python passed before it launches anything.
#include <string_view>

#include "handler.h"
#include "sparse_operands.h"
#include "sparse_product.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

constexpr std::string_view kTarget = "any4_cuda_sparse_product";

ffi::Error Product(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer ends, ffi::AnyBuffer columns,
                   ffi::AnyBuffer values, ffi::Result<ffi::AnyBuffer> y) {
  const auto invalid = [](std::string_view what) { return any4::Invalid(kTarget, what); };
  const auto type = x.element_type();
  if ((type != ffi::BF16 && type != ffi::F16 && type != ffi::F32) || y->element_type() != type) {
    return invalid("need x and y of one type, bfloat16, float16 or float32");
  }
  if (x.dimensions().size() != 2 || y->dimensions().size() != 2 || x.dimensions()[0] != y->dimensions()[0]) {
    return invalid("need two axes of x and y, and as many rows");
  }
  const int64_t m = x.dimensions()[0], n = y->dimensions()[1];
  const auto entries = any4::EntriesOf(ends, columns, values, n, x.dimensions()[1]);
  if (!entries) return invalid("the shapes and types of its operands don't fit together");
  if (m == 0 || n == 0) return ffi::Error::Success();
  const any4::Type of = type == ffi::BF16  ? any4::Type::kBfloat16
                        : type == ffi::F16 ? any4::Type::kFloat16
                                           : any4::Type::kFloat32;
  return any4::Done(kTarget,
                    any4::SparseProduct(*entries, x.untyped_data(), m, of, y->untyped_data(), stream));
}

}  // namespace

// kCmdBufferCompatible: XLA may capture it in a CUDA graph.
XLA_FFI_DEFINE_HANDLER_SYMBOL(any4_cuda_sparse_product, Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {ffi::Traits::kCmdBufferCompatible});
