// XLA's entry point to the step of a dense cache: it checks what Python passed, writes the new tokens, and shares the
// slots among XLA's threads.
#include <algorithm>
#include <string>
#include <string_view>

#include "attention_parts.h"
#include "dense.h"
#include "handler.h"
#include "isa.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using any4::Has;
using Any = ffi::AnyBuffer;
using Floats = ffi::Buffer<ffi::F32>;
using Integers = ffi::Buffer<ffi::S32>;

// Multiply-adds that take a thread less time than it takes to wake another, some 10 us.
constexpr int64_t kWakingWork = int64_t{1} << 19;

ffi::Error Invalid(const std::string& message) { return ffi::Error::InvalidArgument("any4_cpu_attention: " + message); }

// The results' keys, values and length have the memory of the operands.
ffi::Error Step(ffi::ThreadPool pool, Any queries, Any new_keys, Any new_values, Any keys, Any values, Integers length,
                Integers positions, Integers start, Floats cos, Floats sin, ffi::Result<Any> mixed,
                ffi::Result<Any> keys_out, ffi::Result<Any> values_out, ffi::Result<Integers> length_out, float scale,
                float softcap, int64_t window, std::string_view isa_name) {
  const auto isa = any4::IsaNamed(isa_name);
  if (!isa) return Invalid(any4::LacksIsa(isa_name));
  const auto type = any4::TypeOf(queries);
  if (!any4::IsFloat(type)) return Invalid("need float32 or bfloat16");
  for (const Any& each : {new_keys, new_values, keys, values, Any(*mixed), Any(*keys_out), Any(*values_out)}) {
    if (each.element_type() != queries.element_type()) return Invalid("its operands differ in dtype");
  }
  if (keys_out->untyped_data() != keys.untyped_data() || values_out->untyped_data() != values.untyped_data()) {
    return Invalid("the cache must be given away");
  }
  if (queries.dimensions().size() != 3 || new_keys.dimensions().size() != 3 || keys.dimensions().size() != 3) {
    return Invalid("need three axes");
  }
  const bool rotates = cos.element_count() > 0;
  const any4::DenseStep step{queries.untyped_data(), new_keys.untyped_data(), new_values.untyped_data(),
                             keys_out->untyped_data(), values_out->untyped_data(), positions.typed_data(),
                             start.typed_data(), rotates ? cos.typed_data() : nullptr,
                             rotates ? sin.typed_data() : nullptr, *type, queries.dimensions()[0],
                             queries.dimensions()[1], new_keys.dimensions()[1], queries.dimensions()[2],
                             keys.dimensions()[2], scale, softcap, window};
  const int64_t rows = step.rows, groups = step.groups, size = step.size, slots = step.slots, pairs = rows * groups;
  if (size % 16 != 0 || size == 0 || size > any4::kMostChannels) {
    return Invalid("need heads of a multiple of 16 channels up to 256");
  }
  if (groups == 0 || step.heads % groups != 0 || slots == 0 || window < 0) {
    return Invalid("its shapes are empty, or no multiples of one another");
  }
  if (!Has(new_keys, {rows, groups, size}) || !Has(new_values, {rows, groups, size}) || !Has(keys, {pairs, size, slots}) ||
      !Has(values, {pairs, slots, size}) || !Has(*keys_out, {pairs, size, slots}) ||
      !Has(*values_out, {pairs, slots, size}) || length.element_count() != 1 || length_out->element_count() != 1 ||
      !Has(positions, {rows}) || !Has(start, {rows}) || !Has(*mixed, {rows, step.heads, size}) ||
      (rotates && (!Has(cos, {rows, size / 2}) || !Has(sin, {rows, size / 2})))) {
    return Invalid("the shapes of its operands don't fit together");
  }
  if (std::any_of(step.start, step.start + rows, [](int32_t first) { return first < 0; })) {
    return Invalid("a row starts before the first slot");
  }
  const auto& kernel = any4::KernelFor(*isa, any4::PortableDense(), any4::Avx2Dense(), any4::Avx512Dense());
  for (int64_t pair = 0; pair < pairs; ++pair) kernel.append(step, pair);
  any4::Executor executor = any4::ExecutorOf(pool);
  int64_t seen = 0;
  for (int64_t row = 0; row < rows; ++row) seen += std::max<int64_t>(step.own(row) + 1 - step.first(row), 0);
  if (2 * seen * step.heads * size < kWakingWork) executor.threads = 1;
  any4::AttendInParts(executor, step, kernel, {mixed->untyped_data(), size, *type});
  *length_out->typed_data() = *length.typed_data() + 1;
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(any4_cpu_attention, Step,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Any>()
                                  .Ret<Any>()
                                  .Ret<Any>()
                                  .Ret<Integers>()
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("window")
                                  .Attr<std::string_view>("isa"));
