// XLA's entry point to CodedProduct: it checks what Python passed before it launches anything.
#include <cstdint>
#include <string_view>

#include "coded_product.h"
#include "handler.h"
#include "sparse_operands.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using any4::HasShape;

constexpr std::string_view kTarget = "any4_cuda_coded_product";

// Operands: codes low and high, lut; scales: codes low and high, lut, scales, offsets; offsets: the same, without
// elements where there are none; ends, columns and values of the entries, likewise.
constexpr size_t kOperands = 16;

ffi::Error Product(cudaStream_t stream, ffi::AnyBuffer x, ffi::RemainingArgs operands, ffi::Result<ffi::AnyBuffer> y,
                   bool ramp) {
  const auto invalid = [](std::string_view what) { return any4::Invalid(kTarget, what); };
  if (x.dimensions().size() != 2 || y->dimensions().size() != 2 || x.dimensions()[0] != y->dimensions()[0] ||
      x.element_type() != ffi::BF16 || y->element_type() != ffi::BF16) {
    return invalid("need two axes of x and y, as many rows, and bfloat16");
  }
  if (operands.size() != kOperands) return invalid("need 16 operands beside x");
  const auto operand = [&](size_t i) { return *operands.get<ffi::AnyBuffer>(i); };
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1], n = y->dimensions()[1], groups = k / any4::kCodedGroup;
  if (k == 0 || k > any4::kCodedMostInputs || k % any4::kCodedInputs != 0 || n % any4::kCodedRows != 0 || m > 65535 ||
      n * groups > int64_t{UINT32_MAX}) {
    return invalid("need rows of a multiple of 128 inputs, at most 28672, and a multiple of 32 of them");
  }
  const ffi::AnyBuffer low = operand(0), high = operand(1), lut = operand(2);
  const bool one = HasShape(lut, {1, 8});
  const bool bytes = lut.element_type() == ffi::S8;
  if (!HasShape(low, {n, k / 4}) || !HasShape(high, {n, k / 8}) || !(one || HasShape(lut, {n, 8})) ||
      low.element_type() != ffi::U8 || high.element_type() != ffi::U8 ||
      !(bytes || lut.element_type() == ffi::BF16) || (ramp && !one)) {
    return invalid("the codes of W don't fit together, or its table is neither bfloat16 nor int8");
  }
  any4::CodedWeight w{};
  w.codes.codes = static_cast<const uint8_t*>(low.untyped_data());
  w.codes.high = static_cast<const uint8_t*>(high.untyped_data());
  w.codes.lut = lut.untyped_data();
  w.codes.n = n;
  w.codes.k = k;
  w.codes.lut_stride = one ? 0 : 8;
  w.codes.lut_type = bytes ? any4::Type::kInt8 : any4::Type::kBfloat16;
  w.ramp = ramp;
  for (const size_t first : {size_t{3}, size_t{8}}) {
    any4::CodedScales& of = first == 3 ? w.scales : w.offsets;
    const ffi::AnyBuffer codes = operand(first), upper = operand(first + 1), table = operand(first + 2),
                         scales = operand(first + 3), offsets = operand(first + 4);
    if (first != 3 && codes.element_count() == 0) continue;
    if (!HasShape(codes, {groups, n / 4}) || !HasShape(upper, {groups, n / 8}) || !HasShape(table, {1, 8}) ||
        !HasShape(scales, {groups, n / any4::kCodedRun}) || !HasShape(offsets, {groups, n / any4::kCodedRun}) ||
        codes.element_type() != ffi::U8 || upper.element_type() != ffi::U8 || table.element_type() != ffi::BF16 ||
        scales.element_type() != ffi::BF16 || offsets.element_type() != ffi::BF16) {
      return invalid("coded scales have codes of 3 bits in runs of 16 rows, and bfloat16");
    }
    of = {static_cast<const uint8_t*>(codes.untyped_data()), static_cast<const uint8_t*>(upper.untyped_data()),
          table.untyped_data(), scales.untyped_data(), offsets.untyped_data()};
  }
  if (operand(15).element_count() > 0) {
    const auto entries = any4::EntriesOf(operand(13), operand(14), operand(15), n, k);
    if (!entries) return invalid("the shapes and types of the entries don't fit together");
    w.entries = *entries;
  }
  if (m == 0 || n == 0) return ffi::Error::Success();
  return any4::Done(kTarget, any4::CodedProduct(w, x.untyped_data(), m, y->untyped_data(), stream));
}

}  // namespace

// kCmdBufferCompatible: XLA may capture it in a CUDA graph.
XLA_FFI_DEFINE_HANDLER_SYMBOL(any4_cuda_coded_product, Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("ramp"),
                              {ffi::Traits::kCmdBufferCompatible});
