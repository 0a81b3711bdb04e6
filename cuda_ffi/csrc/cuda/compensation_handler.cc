// XLA's entry point to error compensation: it checks what Python passed before it launches anything.
#include <climits>
#include <string_view>

#include "compensation.h"
#include "handler.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

using any4::HasShape;
using Floats = ffi::Buffer<ffi::F32>;

constexpr std::string_view kTarget = "any4_cuda_compensation";

ffi::Error Invalid(std::string_view what) { return any4::Invalid(kTarget, what); }

// `offsets` are absent where they have no elements.
ffi::Error Compensate(cudaStream_t stream, Floats own, Floats wanted, Floats corner, Floats table, Floats scales,
                      Floats offsets, ffi::Result<ffi::Buffer<ffi::U8>> codes, ffi::Result<Floats> errors,
                      bool uniform) {
  if (own.dimensions().size() != 2 || table.dimensions().size() != 2) return Invalid("own and table need two axes");
  const int64_t columns = own.dimensions()[0], rows = own.dimensions()[1], levels = table.dimensions()[1];
  if (columns > any4::kMostColumns || rows > INT_MAX) return Invalid("need at most 128 columns, and 2^31 - 1 rows");
  if (levels < 2 || levels > 256 || (levels & (levels - 1)) != 0) {
    return Invalid("need tables of a power of two of entries, 2 to 256");
  }
  const bool has_offsets = offsets.element_count() > 0;
  if (!HasShape(wanted, {columns, rows}) || !HasShape(corner, {columns, columns}) || !HasShape(table, {rows, levels}) ||
      !HasShape(scales, {columns, rows}) || (has_offsets && !HasShape(offsets, {columns, rows})) ||
      !HasShape(*codes, {columns, rows}) || !HasShape(*errors, {columns, rows})) {
    return Invalid("the shapes of its operands don't fit together");
  }
  if (columns == 0 || rows == 0) return ffi::Error::Success();
  const any4::CompensationBlock block{own.typed_data(),
                                      wanted.typed_data(),
                                      corner.typed_data(),
                                      table.typed_data(),
                                      scales.typed_data(),
                                      has_offsets ? offsets.typed_data() : nullptr,
                                      rows,
                                      static_cast<int>(columns),
                                      static_cast<int>(levels),
                                      uniform};
  return any4::Done(kTarget, any4::Compensate(block, {codes->typed_data(), errors->typed_data()}, stream));
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(any4_cuda_compensation, Compensate,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<ffi::Buffer<ffi::U8>>()
                                  .Ret<Floats>()
                                  .Attr<bool>("uniform"));
