// XLA's entry point to turned coded matrices: it checks what Python passed, and shares the rows among XLA's threads.
#include <string>
#include <string_view>

#include "handler.h"
#include "isa.h"
#include "rows.h"
#include "turned.h"
#include "weight.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using any4::HasShape;
using Floats = ffi::Buffer<ffi::F32>;
using Bytes = ffi::Buffer<ffi::U8>;

ffi::Error Invalid(const std::string& message) { return ffi::Error::InvalidArgument("any4_cpu_turned: " + message); }

// `high` without elements is absent. The table is a ramp, whose length tells the bits of a code.
ffi::Error Decode(ffi::ThreadPool pool, Bytes low, Bytes high, Floats lut, Floats scales, Floats offsets,
                  ffi::Result<Floats> values, int64_t run, std::string_view isa_name) {
  const auto isa = any4::IsaNamed(isa_name);
  if (!isa) return Invalid(any4::LacksIsa(isa_name));
  if (values->dimensions().size() != 2) return Invalid("values need two axes");
  const int64_t n = values->dimensions()[0], columns = values->dimensions()[1];
  const auto levels = static_cast<int64_t>(lut.element_count());
  const int bits = levels == 16 ? 4 : levels == 8 ? 3 : levels == 4 ? 2 : 0;
  if (bits == 0 || run < any4::kTurnedChunk || run % any4::kTurnedChunk != 0) {
    return Invalid("need codes of 2 to 4 bits, in runs of a multiple of 8");
  }
  const bool two = any4::HighBits(bits) > 0;
  const float first = lut.typed_data()[0], step = lut.typed_data()[1] - first;
  const any4::Turned turned{n,
                            columns,
                            run,
                            bits,
                            low.typed_data(),
                            two ? high.typed_data() : nullptr,
                            first,
                            step,
                            scales.typed_data(),
                            offsets.typed_data(),
                            values->typed_data()};
  if (!HasShape(low, columns, any4::PlaneBytes(n, any4::LowBits(bits))) ||
      (two && !HasShape(high, columns, any4::PlaneBytes(n, any4::HighBits(bits)))) ||
      !HasShape(scales, columns, turned.runs()) || !HasShape(offsets, columns, turned.runs())) {
    return Invalid("the shapes of its operands don't fit together");
  }
  const auto& kernel = any4::KernelFor(*isa, any4::PortableTurned(), any4::Avx2Turned(), any4::Avx512Turned());
  const int64_t tiles = (n + any4::kTurnedRows - 1) / any4::kTurnedRows;
  any4::ForRows(any4::ExecutorOf(pool), tiles, turned.scratch_bytes(), [&](int64_t begin, int64_t end, char* scratch) {
    for (int64_t tile = begin; tile < end; ++tile) kernel.decode(turned, tile, scratch);
  });
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(any4_cpu_turned, Decode,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Bytes>()
                                  .Arg<Bytes>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("run")
                                  .Attr<std::string_view>("isa"));
