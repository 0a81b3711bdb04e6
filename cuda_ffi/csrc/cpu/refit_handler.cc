// XLA's entry point to the refit: it checks what Python passed, and shares the rows among XLA's threads.
#include <algorithm>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>

#include "handler.h"
#include "isa.h"
#include "refit.h"
#include "rows.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using any4::HasShape;
using Floats = ffi::Buffer<ffi::F32>;

ffi::Error Invalid(const std::string& message) { return ffi::Error::InvalidArgument("any4_cpu_refit: " + message); }

bool AreStored(ffi::Span<const int64_t> mantissas) {
  if (mantissas.size() != 3) return false;
  const int64_t* const groups = mantissas[0] == 0 ? mantissas.begin() + 1 : mantissas.begin();
  return std::all_of(groups, mantissas.end(), [](int64_t m) { return m == 23 || m == 10 || m == 7; });
}

// `offsets` without elements are absent. Tables, scales and offsets come in one buffer each and go out in another.
ffi::Error Refit(ffi::ThreadPool pool, Floats weights, Floats importance, Floats tables, Floats scales, Floats offsets,
                 ffi::Result<Floats> new_tables, ffi::Result<Floats> new_scales, ffi::Result<Floats> new_offsets,
                 int64_t group_size, int64_t searches, int64_t max_rounds, int64_t first, int64_t stop, float settled,
                 ffi::Span<const float> factors, ffi::Span<const float> held, int64_t fits,
                 ffi::Span<const int64_t> mantissas, std::string_view isa_name) {
  const auto isa = any4::IsaNamed(isa_name);
  if (!isa) return Invalid(any4::LacksIsa(isa_name));
  if (weights.dimensions().size() != 2 || tables.dimensions().size() != 2) return Invalid("w and lut need two axes");
  if (!AreStored(mantissas)) return Invalid("stored dtypes have 23, 10 or 7 bits of mantissa, or a table none");
  const int64_t count = weights.dimensions()[0], inputs = weights.dimensions()[1], entries = tables.dimensions()[1];
  any4::RefitOptions options{};
  options.inputs = inputs;
  options.group_size = group_size;
  options.entries = entries;
  options.first = first;
  options.stop = stop;
  options.searches = searches;
  options.max_rounds = max_rounds;
  options.settled = settled;
  options.factors = factors.begin();
  options.held = held.begin();
  options.starts = static_cast<int64_t>(factors.size());
  options.fits = fits;
  options.table_mantissa = mantissas[0];
  options.scale_mantissa = mantissas[1];
  options.offset_mantissa = mantissas[2];
  if (inputs < 1 || inputs > INT32_MAX / 2 || group_size < 1 || group_size > inputs || entries < 2 ||
      entries > any4::kMaxEntries || first < 0 || stop < first || stop > entries || fits < 1 ||
      held.size() != factors.size()) {
    return Invalid("its sizes are out of range");
  }
  const bool has_offsets = offsets.element_count() > 0;
  const int64_t groups = options.groups();
  if (static_cast<int64_t>(importance.element_count()) != inputs || !HasShape(tables, count, entries) ||
      !HasShape(scales, count, groups) || (has_offsets && !HasShape(offsets, count, groups)) ||
      !HasShape(*new_tables, count, entries) || !HasShape(*new_scales, count, groups) ||
      new_offsets->element_count() != offsets.element_count()) {
    return Invalid("the shapes of its operands don't fit together");
  }
  for (auto [from, to] : {std::pair{&tables, &*new_tables}, {&scales, &*new_scales}, {&offsets, &*new_offsets}}) {
    std::memcpy(to->typed_data(), from->typed_data(), from->size_bytes());
  }
  const auto& kernel = any4::KernelFor(*isa, any4::PortableRefit(), any4::Avx2Refit(), any4::Avx512Refit());
  const auto refit = [&](int64_t begin, int64_t end, char* scratch) {
    const any4::RefitRows rows{end - begin,
                               weights.typed_data() + begin * inputs,
                               importance.typed_data(),
                               new_tables->typed_data() + begin * entries,
                               new_scales->typed_data() + begin * groups,
                               has_offsets ? new_offsets->typed_data() + begin * groups : nullptr};
    kernel.refit(rows, options, scratch);
  };
  any4::ForRows(any4::ExecutorOf(pool), count, kernel.scratch_bytes(options), refit);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(any4_cpu_refit, Refit,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Ret<Floats>()
                                  .Attr<int64_t>("group_size")
                                  .Attr<int64_t>("searches")
                                  .Attr<int64_t>("max_rounds")
                                  .Attr<int64_t>("first")
                                  .Attr<int64_t>("stop")
                                  .Attr<float>("settled")
                                  .Attr<ffi::Span<const float>>("factors")
                                  .Attr<ffi::Span<const float>>("held")
                                  .Attr<int64_t>("fits")
                                  .Attr<ffi::Span<const int64_t>>("mantissas")
                                  .Attr<std::string_view>("isa"));
