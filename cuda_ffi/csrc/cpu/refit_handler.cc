// XLA's way in to the refit: checks what Python passed, and shares the rows among the threads of XLA's pool.
#include <algorithm>
#include <cstring>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <utility>

#include "isa.h"
#include "refit.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using Floats = ffi::Buffer<ffi::F32>;

ffi::Error Invalid(const std::string& message) { return ffi::Error::InvalidArgument("any4_cpu_refit: " + message); }

const any4::RefitKernel* KernelOf(any4::Isa isa) {
  const any4::RefitKernel* const kernel = isa == any4::Isa::kAvx512  ? any4::Avx512Refit()
                                          : isa == any4::Isa::kAvx2 ? any4::Avx2Refit()
                                                                    : nullptr;
  return kernel != nullptr ? kernel : any4::PortableRefit();
}

bool Is(const Floats& array, int64_t rows, int64_t columns) {
  const auto shape = array.dimensions();
  return shape.size() == 2 && shape[0] == rows && shape[1] == columns;
}

bool AreStored(ffi::Span<const int64_t> mantissas) {
  return mantissas.size() == 3 &&
         std::all_of(mantissas.begin(), mantissas.end(), [](int64_t m) { return m == 23 || m == 10 || m == 7; });
}

// Offsets of no elements stand for absent ones. What is refitted comes in as one buffer and goes out as another.
ffi::Error Refit(ffi::ThreadPool pool, Floats weights, Floats importance, Floats tables, Floats scales, Floats offsets,
                 ffi::Result<Floats> new_tables, ffi::Result<Floats> new_scales, ffi::Result<Floats> new_offsets,
                 int64_t group_size, int64_t searches, int64_t max_rounds, int64_t first, int64_t stop, float settled,
                 ffi::Span<const float> factors, ffi::Span<const float> held, int64_t fits,
                 ffi::Span<const int64_t> mantissas, std::string_view isa_name) {
  const auto isa = any4::IsaNamed(isa_name);
  if (!isa) return Invalid("got isa=" + std::string(isa_name) + ", which this processor doesn't have; pass \"auto\"");
  if (weights.dimensions().size() != 2 || tables.dimensions().size() != 2) return Invalid("w and lut need two axes");
  if (!AreStored(mantissas)) return Invalid("stored dtypes have 23, 10 or 7 bits of mantissa");
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
  if (static_cast<int64_t>(importance.element_count()) != inputs || !Is(tables, count, entries) ||
      !Is(scales, count, options.groups()) || (has_offsets && !Is(offsets, count, options.groups())) ||
      !Is(*new_tables, count, entries) || !Is(*new_scales, count, options.groups()) ||
      new_offsets->element_count() != offsets.element_count()) {
    return Invalid("the shapes of its operands don't fit together");
  }
  for (auto [from, to] : {std::pair{&tables, &*new_tables}, {&scales, &*new_scales}, {&offsets, &*new_offsets}}) {
    std::memcpy(to->typed_data(), from->typed_data(), from->size_bytes());
  }
  const any4::RefitKernel& kernel = *KernelOf(*isa);
  const int64_t bytes = kernel.scratch_bytes(options);

  any4::Executor executor;
  executor.threads = std::max<int64_t>(pool.num_threads(), 1);
  executor.spawn = [&pool](std::function<void()> task) { pool.Schedule(std::move(task)); };
  // A few tasks a thread, so that scratch is rarely allocated and no thread waits long for the last one.
  const int64_t tasks = std::min(count, 4 * executor.threads);
  any4::ParallelFor(executor, tasks, [&](int64_t task) {
    constexpr std::align_val_t kAlignment{64};
    const std::unique_ptr<char, void (*)(char*)> scratch(static_cast<char*>(::operator new(bytes, kAlignment)),
                                                         [](char* memory) { ::operator delete(memory, kAlignment); });
    const int64_t begin = count * task / tasks, end = count * (task + 1) / tasks;
    const any4::RefitRows rows{end - begin,
                               weights.typed_data() + begin * inputs,
                               importance.typed_data(),
                               new_tables->typed_data() + begin * entries,
                               new_scales->typed_data() + begin * options.groups(),
                               has_offsets ? new_offsets->typed_data() + begin * options.groups() : nullptr};
    kernel.refit(rows, options, scratch.get());
  });
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
