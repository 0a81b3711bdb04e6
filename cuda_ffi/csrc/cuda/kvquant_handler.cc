// XLA's entry point to decode attention over a KVQuant cache: it checks what Python passed before it launches anything.
#include <algorithm>
#include <climits>
#include <string_view>

#include "handler.h"
#include "kvquant.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

using any4::HasShape;
using Any = ffi::AnyBuffer;
using Bytes = ffi::Buffer<ffi::U8>;
using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;

constexpr std::string_view kTarget = "any4_cuda_kvquant_attention";

ffi::Error Invalid(std::string_view what) { return any4::Invalid(kTarget, what); }

// A second plane, or a cos, without elements is absent. Keys have no ranges.
ffi::Error Attend(cudaStream_t stream, Any queries, Bytes key_codes, Bytes key_high, Any key_outliers, Any key_channels,
                  Bytes value_codes, Bytes value_high, Any value_outliers, Any value_channels, Any value_ranges,
                  Floats key_levels, Floats scales, Floats offsets, Floats value_levels, Any first_keys, Any first_values,
                  Any recent_keys, Any recent_values, Ints positions, Floats cos, Floats sin, Floats turn_cos,
                  Floats turn_sin, ffi::Result<Any> mixed, ffi::Result<Floats> partials, float scale, float softcap,
                  int64_t window, int64_t bits) {
  const ffi::DataType type = queries.element_type(), kind = key_channels.element_type();
  for (const Any& each : {key_outliers, value_outliers, value_ranges, first_keys, first_values, recent_keys, recent_values,
                          Any(*mixed)}) {
    if (each.element_type() != type) return Invalid("its operands differ in dtype");
  }
  if (type != ffi::BF16 && type != ffi::F16) return Invalid("need bfloat16 or float16");
  if ((kind != ffi::U8 && kind != ffi::U16) || value_channels.element_type() != kind) {
    return Invalid("need channels of uint8 or uint16");
  }
  if (bits != 4 && bits != 3 && bits != 2) return Invalid("need 4, 3 or 2 bits");
  if (queries.dimensions().size() != 3 || first_keys.dimensions().size() != 4 || recent_keys.dimensions().size() != 4 ||
      key_outliers.dimensions().size() != 4 || cos.dimensions().size() != 2 || turn_cos.dimensions().size() != 2) {
    return Invalid("queries need three axes, factors two, and the cache four");
  }
  const int64_t rows = queries.dimensions()[0], heads = queries.dimensions()[1], size = queries.dimensions()[2];
  const int64_t groups = first_keys.dimensions()[1], sinks = first_keys.dimensions()[2], recent = recent_keys.dimensions()[2];
  const int64_t room = key_outliers.dimensions()[2], slots = key_outliers.dimensions()[3];
  if (size != 64 && size != 128) return Invalid("need heads of 64 or 128 channels");
  if (groups == 0 || heads % groups != 0 || window < 0) return Invalid("its shapes are empty, or no multiples of one another");
  if (room % 8 != 0 || slots > any4::kMostOutliers) {
    return Invalid("need positions in multiples of 8, and up to 48 outliers of a token");
  }
  const bool two = bits == 3, rotates = cos.element_count() > 0;
  const int64_t bytes = bits == 4 ? size / 2 : size / 4, half = size / 2, levels = int64_t{1} << bits;
  const auto planes_fit = [&](const Bytes& low, const Bytes& high) {
    return HasShape(low, {rows, groups, room, bytes}) &&
           (two ? HasShape(high, {rows, groups, room, size / 8}) : high.element_count() == 0);
  };
  if (!planes_fit(key_codes, key_high) || !planes_fit(value_codes, value_high) ||
      !HasShape(key_outliers, {rows, 1, room, slots}) || !HasShape(key_channels, {rows, 1, room, slots}) ||
      !HasShape(value_outliers, {rows, 1, room, slots}) || !HasShape(value_channels, {rows, 1, room, slots}) ||
      !HasShape(value_ranges, {rows, 1, room, 2}) || !HasShape(key_levels, {levels}) || !HasShape(value_levels, {levels}) ||
      !HasShape(scales, {groups, size}) || !HasShape(offsets, {groups, size}) ||
      !HasShape(first_keys, {rows, groups, sinks, size}) || !HasShape(first_values, {rows, groups, sinks, size}) ||
      !HasShape(recent_keys, {rows, groups, recent, size}) || !HasShape(recent_values, {rows, groups, recent, size}) ||
      !HasShape(positions, {rows}) || !HasShape(*mixed, {rows, heads, size}) ||
      !HasShape(sin, {cos.dimensions()[0], cos.dimensions()[1]}) ||
      !HasShape(turn_sin, {turn_cos.dimensions()[0], turn_cos.dimensions()[1]}) ||
      (rotates && (!HasShape(cos, {any4::kTurn, half}) || turn_cos.dimensions()[1] != half ||
                   turn_cos.dimensions()[0] * any4::kTurn < room + recent)) ||
      !HasShape(*partials, {rows, heads, any4::kMostParts, size + 2})) {
    return Invalid("the shapes of its operands don't fit together");
  }
  if (rows * groups > 65535 || heads / groups > 65535 || room > INT_MAX / 2 || recent > INT_MAX / 2 || sinks > INT_MAX / 2) {
    return Invalid("it is too large");
  }
  if (rows == 0 || room + recent == 0) return ffi::Error::Success();
  const auto number = [](int64_t n) { return static_cast<int>(std::min<int64_t>(n, INT_MAX)); };
  const any4::AttentionStep token{queries.untyped_data(),
                                  nullptr,
                                  nullptr,
                                  recent_keys.untyped_data(),
                                  recent_values.untyped_data(),
                                  nullptr,
                                  positions.typed_data(),
                                  nullptr,
                                  nullptr,
                                  nullptr,
                                  mixed->untyped_data(),
                                  partials->typed_data(),
                                  number(rows),
                                  number(heads),
                                  number(groups),
                                  number(size),
                                  number(recent),
                                  scale,
                                  softcap,
                                  number(window)};
  const any4::KVQuantCodes keys{{key_codes.typed_data(), two ? key_high.typed_data() : nullptr},
                                key_outliers.untyped_data(), key_channels.untyped_data(), nullptr, key_levels.typed_data()};
  const any4::KVQuantCodes values{{value_codes.typed_data(), two ? value_high.typed_data() : nullptr},
                                  value_outliers.untyped_data(), value_channels.untyped_data(), value_ranges.untyped_data(),
                                  value_levels.typed_data()};
  const any4::KVQuantStep step{token,
                               keys,
                               values,
                               scales.typed_data(),
                               offsets.typed_data(),
                               first_keys.untyped_data(),
                               first_values.untyped_data(),
                               rotates ? cos.typed_data() : nullptr,
                               sin.typed_data(),
                               turn_cos.typed_data(),
                               turn_sin.typed_data(),
                               number(bits),
                               number(room),
                               number(slots),
                               kind == ffi::U8 ? 1 : 2,
                               number(sinks)};
  return any4::Done(kTarget, type == ffi::BF16 ? any4::AttendKVQuantBfloat16(step, stream)
                                               : any4::AttendKVQuantFloat16(step, stream));
}

}  // namespace

// kCmdBufferCompatible: XLA may capture it in a CUDA graph.
XLA_FFI_DEFINE_HANDLER_SYMBOL(any4_cuda_kvquant_attention, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
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
                                  .Arg<Ints>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Any>()
                                  .Ret<Floats>()
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("bits"),
                              {ffi::Traits::kCmdBufferCompatible});
