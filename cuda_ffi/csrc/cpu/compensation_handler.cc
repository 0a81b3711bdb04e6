// XLA's entry point to error compensation: it checks what Python passed, and shares the rows among XLA's threads.
#include <string>
#include <string_view>

#include "compensation.h"
#include "handler.h"
#include "isa.h"
#include "rows.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using any4::HasShape;
using Floats = ffi::Buffer<ffi::F32>;

ffi::Error Invalid(const std::string& message) {
  return ffi::Error::InvalidArgument("any4_cpu_compensation: " + message);
}

// `offsets` without elements are absent.
ffi::Error Compensate(ffi::ThreadPool pool, Floats own, Floats wanted, Floats corner, Floats table, Floats scales,
                      Floats offsets, ffi::Result<ffi::Buffer<ffi::U8>> codes, ffi::Result<Floats> errors,
                      bool uniform, std::string_view isa_name) {
  const auto isa = any4::IsaNamed(isa_name);
  if (!isa) return Invalid(any4::LacksIsa(isa_name));
  if (own.dimensions().size() != 2 || table.dimensions().size() != 2) return Invalid("own and table need two axes");
  const int64_t columns = own.dimensions()[0], rows = own.dimensions()[1], levels = table.dimensions()[1];
  if (levels < 2 || levels > 256 || (levels & (levels - 1)) != 0) {
    return Invalid("need tables of a power of two of entries, 2 to 256");
  }
  const bool has_offsets = offsets.element_count() > 0;
  if (!HasShape(wanted, columns, rows) || !HasShape(corner, columns, columns) || !HasShape(table, rows, levels) ||
      !HasShape(scales, columns, rows) || (has_offsets && !HasShape(offsets, columns, rows)) ||
      !HasShape(*codes, columns, rows) || !HasShape(*errors, columns, rows)) {
    return Invalid("the shapes of its operands don't fit together");
  }
  const any4::CompensationBlock block{own.typed_data(),
                                      wanted.typed_data(),
                                      corner.typed_data(),
                                      table.typed_data(),
                                      scales.typed_data(),
                                      has_offsets ? offsets.typed_data() : nullptr,
                                      rows,
                                      columns,
                                      levels,
                                      uniform,
                                      codes->typed_data(),
                                      errors->typed_data()};
  const auto& kernel =
      any4::KernelFor(*isa, any4::PortableCompensation(), any4::Avx2Compensation(), any4::Avx512Compensation());
  const int64_t tiles = columns == 0 ? 0 : (rows + kernel.tile - 1) / kernel.tile;
  any4::ForRows(
      any4::ExecutorOf(pool), tiles, kernel.scratch_bytes(block),
      [&](int64_t begin, int64_t end, char* scratch) { kernel.compensate(block, begin, end, scratch); });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(any4_cpu_compensation, Compensate,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<ffi::Buffer<ffi::U8>>()
                                  .Ret<Floats>()
                                  .Attr<bool>("uniform")
                                  .Attr<std::string_view>("isa"));
