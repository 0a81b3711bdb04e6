// XLA's entry point to attention over a KVQuant cache: it checks what Python passed, and shares the tokens among XLA's
// threads.
#include <algorithm>
#include <string>
#include <string_view>

#include "attention_parts.h"
#include "handler.h"
#include "isa.h"
#include "kvquant.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using any4::Has;
using Any = ffi::AnyBuffer;
using Bytes = ffi::Buffer<ffi::U8>;
using Floats = ffi::Buffer<ffi::F32>;

ffi::Error Invalid(const std::string& message) {
  return ffi::Error::InvalidArgument("any4_cpu_kvquant_attention: " + message);
}

// A second plane, or a cos, without elements is absent. Keys have no ranges.
ffi::Error Attend(ffi::ThreadPool pool, Any queries, Bytes key_codes, Bytes key_high, Any key_outliers, Any key_channels,
                  Bytes value_codes, Bytes value_high, Any value_outliers, Any value_channels, Any value_ranges,
                  Floats key_levels, Floats scales, Floats offsets, Floats value_levels, Any first_keys, Any first_values,
                  Any recent_keys, Any recent_values, ffi::Buffer<ffi::S32> positions, Floats cos, Floats sin,
                  Floats chunk_cos, Floats chunk_sin, ffi::Result<Any> mixed, float scale, float softcap, int64_t window,
                  int64_t bits, std::string_view isa_name) {
  const auto isa = any4::IsaNamed(isa_name);
  if (!isa) return Invalid(any4::LacksIsa(isa_name));
  const auto type = any4::TypeOf(queries);
  if (!any4::IsFloat(type)) return Invalid("need float32 or bfloat16");
  for (const Any& each : {key_outliers, value_outliers, value_ranges, first_keys, first_values, recent_keys, recent_values,
                          Any(*mixed)}) {
    if (each.element_type() != queries.element_type()) return Invalid("its operands differ in dtype");
  }
  const ffi::DataType kind = key_channels.element_type();
  if ((kind != ffi::U8 && kind != ffi::U16) || value_channels.element_type() != kind) {
    return Invalid("need channels of uint8 or uint16");
  }
  if (bits != 4 && bits != 3 && bits != 2) return Invalid("need 4, 3 or 2 bits");
  if (queries.dimensions().size() != 3 || first_keys.dimensions().size() != 4 || recent_keys.dimensions().size() != 4 ||
      key_outliers.dimensions().size() != 4 || cos.dimensions().size() != 2 || chunk_cos.dimensions().size() != 2) {
    return Invalid("queries need three axes, factors two, and the cache four");
  }
  const int64_t rows = queries.dimensions()[0], heads = queries.dimensions()[1], size = queries.dimensions()[2];
  const int64_t groups = first_keys.dimensions()[1], sinks = first_keys.dimensions()[2], recent = recent_keys.dimensions()[2];
  const int64_t room = key_outliers.dimensions()[2], slots = key_outliers.dimensions()[3];
  if (size % 32 != 0 || size == 0 || size > any4::kMostChannels) {
    return Invalid("need heads of a multiple of 32 channels up to 256");
  }
  if (groups == 0 || heads % groups != 0 || window < 0) return Invalid("its shapes are empty, or no multiples of one another");
  const bool two = bits == 3, rotates = cos.element_count() > 0;
  const int64_t bytes = bits == 4 ? size / 2 : size / 4, half = size / 2, levels = int64_t{1} << bits;
  const auto planes_fit = [&](const Bytes& low, const Bytes& high) {
    return Has(low, {rows, groups, room, bytes}) &&
           (two ? Has(high, {rows, groups, room, size / 8}) : high.element_count() == 0);
  };
  if (!planes_fit(key_codes, key_high) || !planes_fit(value_codes, value_high) ||
      !Has(key_outliers, {rows, 1, room, slots}) || !Has(key_channels, {rows, 1, room, slots}) ||
      !Has(value_outliers, {rows, 1, room, slots}) || !Has(value_channels, {rows, 1, room, slots}) ||
      !Has(value_ranges, {rows, 1, room, 2}) || !Has(key_levels, {levels}) || !Has(value_levels, {levels}) ||
      !Has(scales, {groups, size}) || !Has(offsets, {groups, size}) || !Has(first_keys, {rows, groups, sinks, size}) ||
      !Has(first_values, {rows, groups, sinks, size}) || !Has(recent_keys, {rows, groups, recent, size}) ||
      !Has(recent_values, {rows, groups, recent, size}) || !Has(positions, {rows}) || !Has(*mixed, {rows, heads, size}) ||
      !Has(sin, {cos.dimensions()[0], cos.dimensions()[1]}) ||
      !Has(chunk_sin, {chunk_cos.dimensions()[0], chunk_cos.dimensions()[1]}) ||
      (rotates && (!Has(cos, {any4::kAttentionChunk, half}) || chunk_cos.dimensions()[1] != half))) {
    return Invalid("the shapes of its operands don't fit together");
  }
  const any4::TokenCodes keys{{key_codes.typed_data(), two ? key_high.typed_data() : nullptr},
                              key_outliers.untyped_data(), key_channels.untyped_data(), nullptr, key_levels.typed_data()};
  const any4::TokenCodes values{{value_codes.typed_data(), two ? value_high.typed_data() : nullptr},
                                value_outliers.untyped_data(), value_channels.untyped_data(), value_ranges.untyped_data(),
                                value_levels.typed_data()};
  const any4::KVQuantStep step{queries.untyped_data(), keys, values, scales.typed_data(), offsets.typed_data(),
                               first_keys.untyped_data(), first_values.untyped_data(), recent_keys.untyped_data(),
                               recent_values.untyped_data(), positions.typed_data(), rotates ? cos.typed_data() : nullptr,
                               sin.typed_data(), chunk_cos.typed_data(), chunk_sin.typed_data(), *type, rows, heads, groups,
                               size, room, slots, kind == ffi::U8 ? 1 : 2, sinks, recent, bits, scale, softcap, window};
  for (int64_t row = 0; row < rows; ++row) {
    if (step.own(row) >= room + recent ||
        (rotates && step.own(row) >= chunk_cos.dimensions()[0] * any4::kAttentionChunk)) {
      return Invalid("a position is beyond what the cache has room for");
    }
  }
  const auto& kernel = any4::KernelFor(*isa, any4::PortableKVQuant(), any4::Avx2KVQuant(), any4::Avx512KVQuant());
  any4::AttendInParts(any4::ExecutorOf(pool), step, kernel, {mixed->untyped_data(), size, *type});
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(any4_cpu_kvquant_attention, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Any>()
                                  .Arg<Bytes>()
                                  .Arg<Bytes>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Arg<Bytes>()
                                  .Arg<Bytes>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Any>()
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("bits")
                                  .Attr<std::string_view>("isa"));
