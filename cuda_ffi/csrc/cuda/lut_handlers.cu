// XLA's way in: checks what Python passed before anything is launched.
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "lut_product.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

std::optional<any4::Type> TypeOf(const ffi::AnyBuffer& buffer) {
  switch (buffer.element_type()) {
    case ffi::BF16: return any4::Type::kBfloat16;
    case ffi::F16: return any4::Type::kFloat16;
    case ffi::F32: return any4::Type::kFloat32;
    case ffi::U8: return any4::Type::kE8m0;
    default: return std::nullopt;
  }
}

bool IsHalf(std::optional<any4::Type> type) {
  return type == any4::Type::kBfloat16 || type == any4::Type::kFloat16;
}

bool HasShape(const ffi::AnyBuffer& buffer, int64_t rows, int64_t columns) {
  const auto dims = buffer.dimensions();
  return dims.size() == 2 && dims[0] == rows && dims[1] == columns;
}

ffi::Error Invalid(std::string_view what) { return ffi::Error::InvalidArgument("any4_cuda: " + std::string(what)); }

ffi::Error Done(cudaError_t error) {
  if (error == cudaSuccess) return ffi::Error::Success();
  return ffi::Error::Internal(std::string("any4_cuda: the launch failed: ") + cudaGetErrorString(error));
}

// The operands that both handlers have, as a weight of k inputs; `high` and `offsets` of no elements stand for absent.
struct Operands {
  ffi::AnyBuffer codes, high, lut, scales, offsets;
  int64_t bits, group_size;

  ffi::Error Check(int64_t k, any4::LutWeight& w) const {
    if (bits != 2 && bits != 3 && bits != 4 && bits != 8) return Invalid("need codes of 2, 3, 4 or 8 bits");
    if (codes.dimensions().size() != 2 || lut.dimensions().size() != 2) return Invalid("codes and lut need two axes");
    // A group below k starts and ends with 16 inputs of a lane, and the groups of a tile are a power of two.
    const bool whole = group_size >= k, power = group_size >= 16 && (group_size & (group_size - 1)) == 0;
    if (k % 32 != 0 || !(whole || power)) return Invalid("need k % 32 == 0, and groups of a power of two from 16 on");
    w.n = codes.dimensions()[0];
    w.k = k;
    // Up to 31 inputs may be there to fill up the row; they need no group.
    const auto groups = [&](int64_t inputs) { return whole ? 1 : (inputs + group_size - 1) / group_size; };
    if (scales.dimensions().size() != 2) return Invalid("scales need two axes");
    w.groups = scales.dimensions()[1];
    const bool one = lut.dimensions()[0] == 1;
    const bool with_high = bits == 3, with_offsets = offsets.element_count() > 0;
    const int64_t width = with_high ? 2 : bits;
    if (!HasShape(codes, w.n, k * width / 8) || (with_high && !HasShape(high, w.n, k / 8)) ||
        !HasShape(lut, one ? 1 : w.n, int64_t{1} << bits) || w.groups < groups(k - 31) ||
        w.groups > groups(k) || !HasShape(scales, w.n, w.groups) ||
        (with_offsets && !HasShape(offsets, w.n, w.groups))) {
      return Invalid("the shapes of its operands don't fit together");
    }
    const auto lut_type = TypeOf(lut), scale_type = TypeOf(scales), offset_type = TypeOf(offsets);
    if (!IsHalf(lut_type) || !scale_type || !offset_type || offset_type == any4::Type::kE8m0 ||
        codes.element_type() != ffi::U8) {
      return Invalid("need codes uint8, lut bfloat16 or float16, scales and offsets these, float32 or e8m0");
    }
    w.codes = static_cast<const uint8_t*>(codes.untyped_data());
    w.high = with_high ? static_cast<const uint8_t*>(high.untyped_data()) : nullptr;
    w.lut = lut.untyped_data();
    w.scales = scales.untyped_data();
    w.offsets = with_offsets ? offsets.untyped_data() : nullptr;
    w.lut_stride = one ? 0 : int64_t{1} << bits;
    w.lut_type = *lut_type;
    w.scale_type = *scale_type;
    w.offset_type = *offset_type;
    return ffi::Error::Success();
  }
};

bool Fits(any4::Type lut, std::optional<any4::Type> type) {
  return IsHalf(type) && (lut == *type || *type == any4::Type::kFloat16);
}

ffi::Error Product(cudaStream_t stream, ffi::AnyBuffer x, ffi::AnyBuffer codes, ffi::AnyBuffer high, ffi::AnyBuffer lut,
                   ffi::AnyBuffer scales, ffi::AnyBuffer offsets, ffi::Result<ffi::AnyBuffer> y, int64_t bits,
                   int64_t group_size) {
  if (x.dimensions().size() != 2) return Invalid("x needs two axes");
  any4::LutWeight w{};
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1];
  const Operands operands{codes, high, lut, scales, offsets, bits, group_size};
  if (auto error = operands.Check(k, w); error.failure()) return error;
  if (!HasShape(*y, m, w.n) || !Fits(w.lut_type, TypeOf(x)) || TypeOf(*y) != TypeOf(x)) {
    return Invalid("need x and y of one type, bfloat16 with a table of it or float16");
  }
  if (m == 0 || w.n == 0) return ffi::Error::Success();
  return Done(any4::LutProduct(w, static_cast<int>(bits), group_size, x.untyped_data(), y->untyped_data(), m,
                               *TypeOf(x), stream));
}

ffi::Error Dequantize(cudaStream_t stream, ffi::AnyBuffer codes, ffi::AnyBuffer high, ffi::AnyBuffer lut,
                      ffi::AnyBuffer scales, ffi::AnyBuffer offsets, ffi::Result<ffi::AnyBuffer> out, int64_t bits,
                      int64_t group_size) {
  if (out->dimensions().size() != 2) return Invalid("the result needs two axes");
  any4::LutWeight w{};
  const int64_t k = out->dimensions()[1];
  const Operands operands{codes, high, lut, scales, offsets, bits, group_size};
  if (auto error = operands.Check(k, w); error.failure()) return error;
  if (out->dimensions()[0] != w.n || !Fits(w.lut_type, TypeOf(*out))) {
    return Invalid("need a result [n, k], bfloat16 with a table of it or float16");
  }
  if (w.n == 0) return ffi::Error::Success();
  return Done(any4::LutDequantize(w, static_cast<int>(bits), group_size, out->untyped_data(), *TypeOf(*out), stream));
}

}  // namespace

// kCmdBufferCompatible: XLA may capture them in a CUDA graph.
XLA_FFI_DEFINE_HANDLER_SYMBOL(any4_cuda_lut_product, Product,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group_size"),
                              {ffi::Traits::kCmdBufferCompatible});

XLA_FFI_DEFINE_HANDLER_SYMBOL(any4_cuda_lut_dequantize, Dequantize,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<int64_t>("bits")
                                  .Attr<int64_t>("group_size"),
                              {ffi::Traits::kCmdBufferCompatible});

// Version of XLA's FFI that the handlers were compiled for, major * 1000 + minor.
extern "C" int any4_ffi_abi() { return XLA_FFI_API_MAJOR * 1000 + XLA_FFI_API_MINOR; }
