// XLA's entry point to attention over a KIVI cache: it checks what Python passed, and shares the tokens among XLA's
// threads.
#include <algorithm>
#include <string>
#include <string_view>

#include "attention_parts.h"
#include "handler.h"
#include "isa.h"
#include "kivi.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using any4::Has;
using Any = ffi::AnyBuffer;
using Bytes = ffi::Buffer<ffi::U8>;

ffi::Error Invalid(const std::string& message) {
  return ffi::Error::InvalidArgument("any4_cpu_kivi_attention: " + message);
}

ffi::Error Attend(ffi::ThreadPool pool, Any queries, Any keys, Any values, Bytes key_codes, Any key_steps,
                  Any key_lowest, Bytes value_codes, Any value_steps, Any value_lowest, ffi::Buffer<ffi::S32> positions,
                  ffi::Result<Any> mixed, float scale, float softcap, int64_t window, int64_t group_size,
                  std::string_view isa_name) {
  const auto isa = any4::IsaNamed(isa_name);
  if (!isa) return Invalid(any4::LacksIsa(isa_name));
  const auto type = any4::TypeOf(queries);
  if (!any4::IsFloat(type)) return Invalid("need float32 or bfloat16");
  for (const Any& each : {keys, values, key_steps, key_lowest, value_steps, value_lowest, Any(*mixed)}) {
    if (each.element_type() != queries.element_type()) return Invalid("its operands differ in dtype");
  }
  if (queries.dimensions().size() != 3 || keys.dimensions().size() != 4 || key_codes.dimensions().size() != 4 ||
      key_steps.dimensions().size() != 4 || value_codes.dimensions().size() != 4) {
    return Invalid("queries need three axes, and the cache needs four");
  }
  any4::KiviStep step{queries.untyped_data(), keys.untyped_data(), values.untyped_data(), key_codes.typed_data(),
                      key_steps.untyped_data(), key_lowest.untyped_data(), value_codes.typed_data(),
                      value_steps.untyped_data(), value_lowest.untyped_data(), positions.typed_data(), *type,
                      queries.dimensions()[0], queries.dimensions()[1], keys.dimensions()[1],
                      queries.dimensions()[2], keys.dimensions()[2], group_size, 0, 0,
                      key_steps.dimensions()[3] * group_size, value_codes.dimensions()[2], scale, softcap, window};
  if (step.size != 32 && step.size != 64 && step.size != 128 && step.size != 256) {
    return Invalid("need heads of 32, 64, 128 or 256 channels");
  }
  if (group_size < 16 || group_size % 16 != 0 || (group_size < step.size && step.size % group_size != 0)) {
    return Invalid("need groups of a multiple of 16 that divides a head's channels");
  }
  if (step.groups == 0 || step.heads % step.groups != 0 || step.residual == 0 || step.key_positions == 0 ||
      step.value_positions == 0 || step.value_positions % 16 != 0 || window < 0) {
    return Invalid("its shapes are empty, or no multiples of one another");
  }
  step.key_bits = key_codes.dimensions()[3] * 8 / step.key_positions;
  step.value_bits = value_codes.dimensions()[3] * 8 / step.size;
  if ((step.key_bits != 4 && step.key_bits != 2) || (step.value_bits != 4 && step.value_bits != 2)) {
    return Invalid("need 4 or 2 bits");
  }
  const int64_t rows = step.rows, groups = step.groups, size = step.size;
  const int64_t key_groups = step.key_positions / group_size;
  if (!Has(keys, {rows, groups, step.residual, size}) || !Has(values, {rows, groups, step.residual, size}) ||
      !Has(key_codes, {rows, groups, size, step.key_positions / 8 * step.key_bits}) ||
      !Has(key_steps, {rows, groups, size, key_groups}) || !Has(key_lowest, {rows, groups, size, key_groups}) ||
      !Has(value_codes, {rows, groups, step.value_positions, size / 8 * step.value_bits}) ||
      !Has(value_steps, {rows, groups, step.value_positions, step.value_groups()}) ||
      !Has(value_lowest, {rows, groups, step.value_positions, step.value_groups()}) || !Has(positions, {rows}) ||
      !Has(*mixed, {rows, step.heads, size})) {
    return Invalid("the shapes of its operands don't fit together");
  }
  for (int64_t row = 0; row < rows; ++row) {
    if (step.own(row) < 0) continue;
    if (step.exact_keys(row) > step.key_positions || step.exact_values(row) > step.value_positions) {
      return Invalid("a position is beyond what the cache has room for");
    }
  }
  const auto& kernel = any4::KernelFor(*isa, any4::PortableKivi(), any4::Avx2Kivi(), any4::Avx512Kivi());
  any4::AttendInParts(any4::ExecutorOf(pool), step, kernel, {mixed->untyped_data(), size, *type});
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(any4_cpu_kivi_attention, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Arg<Bytes>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Arg<Bytes>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Ret<Any>()
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("group_size")
                                  .Attr<std::string_view>("isa"));
