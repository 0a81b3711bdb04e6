// XLA's entry point to BinaryProduct: it checks what Python passed before it launches anything.
#include <algorithm>
#include <cstdint>
#include <string_view>

#include "binary_product.h"
#include "handler.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using any4::HasShape;

constexpr std::string_view kTarget = "any4_cuda_binary_product";

// The operands of each plane: codes, lut, scales, offsets. `offsets` are absent where they have no elements.
constexpr size_t kOperands = 4;

ffi::Error Product(cudaStream_t stream, ffi::AnyBuffer x, ffi::RemainingArgs operands, ffi::Result<ffi::AnyBuffer> y,
                   int64_t group_size) {
  const auto invalid = [](std::string_view what) { return any4::Invalid(kTarget, what); };
  const auto type = x.element_type();
  if ((type != ffi::BF16 && type != ffi::F16) || y->element_type() != type || y->dimensions().size() != 2) {
    return invalid("need x and y of one type, bfloat16 or float16, and two axes of y");
  }
  const size_t count = operands.size() / kOperands;
  if (operands.size() % kOperands != 0 || count == 0 || count > any4::kMostPlanes) {
    return invalid("need four operands for each of 1 to 4 planes");
  }
  const int64_t m = y->dimensions()[0], n = y->dimensions()[1];
  any4::BinaryWeight w{};
  w.count = static_cast<int>(count);
  w.n = n;
  w.k = operands.get<ffi::AnyBuffer>(0)->dimensions().back() * 8;
  while (w.group_shift < 30 && (int64_t{any4::kBinaryTile} << w.group_shift) < std::min(group_size, w.k)) {
    ++w.group_shift;
  }
  const bool whole = group_size >= w.k;
  if (m > 65535 || w.k > any4::kBinaryMostInputs || w.k % any4::kBinaryTile != 0 || w.n * w.k / 8 > int64_t{UINT32_MAX} ||
      !(whole || group_size == int64_t{any4::kBinaryTile} << w.group_shift)) {
    return invalid("need rows of a multiple of 128 inputs, at most 32768, and groups of a power of two times as many");
  }
  w.groups = whole ? 1 : (w.k + group_size - 1) / group_size;
  if (!HasShape(x, {m, w.k})) return invalid("x and W don't have as many inputs");
  for (size_t p = 0; p < count; ++p) {
    const auto operand = [&](size_t i) { return *operands.get<ffi::AnyBuffer>(p * kOperands + i); };
    const ffi::AnyBuffer codes = operand(0), lut = operand(1), scales = operand(2), offsets = operand(3);
    const bool one = HasShape(lut, {1, 2}), with_offsets = offsets.element_count() > 0;
    if (!HasShape(codes, {n, w.k / 8}) || !(one || HasShape(lut, {n, 2})) || !HasShape(scales, {n, w.groups}) ||
        (with_offsets && !HasShape(offsets, {n, w.groups}))) {
      return invalid("the shapes of its operands don't fit together");
    }
    if (codes.element_type() != ffi::U8 || lut.element_type() != ffi::BF16 || scales.element_type() != ffi::BF16 ||
        offsets.element_type() != ffi::BF16) {
      return invalid("need codes uint8, and the rest in bfloat16");
    }
    w.planes[p] = {codes.untyped_data(), lut.untyped_data(), scales.untyped_data(),
                   with_offsets ? offsets.untyped_data() : nullptr, !one};
  }
  if (m == 0 || n == 0) return ffi::Error::Success();
  return any4::Done(kTarget, any4::BinaryProduct(w, x.untyped_data(), m,
                                                 type == ffi::BF16 ? any4::Type::kBfloat16 : any4::Type::kFloat16,
                                                 y->untyped_data(), stream));
}

}  // namespace

// kCmdBufferCompatible: XLA may capture it in a CUDA graph.
XLA_FFI_DEFINE_HANDLER_SYMBOL(any4_cuda_binary_product, Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("group_size"),
                              {ffi::Traits::kCmdBufferCompatible});
