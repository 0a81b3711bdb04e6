// XLA's entry point to decode attention over a KIVI cache: it checks what Python passed before it launches anything.
#include <algorithm>
#include <climits>
#include <string_view>

#include "handler.h"
#include "kivi.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

using any4::HasShape;
using Any = ffi::AnyBuffer;
using Bytes = ffi::Buffer<ffi::U8>;
using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;

constexpr std::string_view kTarget = "any4_cuda_kivi_attention";

ffi::Error Invalid(std::string_view what) { return any4::Invalid(kTarget, what); }

// The results from `keys_out` to `length_out` are the memory of the operands with the same name.
ffi::Error Attend(cudaStream_t stream, Any queries, Any new_keys, Any new_values, Any keys, Any values, Bytes key_codes,
                  Any key_steps, Any key_lowest, Bytes value_codes, Any value_steps, Any value_lowest, Ints length,
                  Ints positions, Ints start, Floats cos, Floats sin, ffi::Result<Any> mixed,
                  ffi::Result<Any> keys_out, ffi::Result<Any> values_out, ffi::Result<Bytes> key_codes_out,
                  ffi::Result<Any> key_steps_out, ffi::Result<Any> key_lowest_out, ffi::Result<Bytes> value_codes_out,
                  ffi::Result<Any> value_steps_out, ffi::Result<Any> value_lowest_out, ffi::Result<Ints> length_out,
                  ffi::Result<Floats> partials, float scale, float softcap, int64_t window, int64_t group_size) {
  const ffi::DataType type = queries.element_type();
  for (const Any& each : {new_keys, new_values, keys, values, key_steps, key_lowest, value_steps, value_lowest, *mixed}) {
    if (each.element_type() != type) return Invalid("its operands differ in dtype");
  }
  if (type != ffi::BF16 && type != ffi::F16) return Invalid("need bfloat16 or float16");
  if (queries.dimensions().size() != 3 || keys.dimensions().size() != 4 || key_codes.dimensions().size() != 4 ||
      key_steps.dimensions().size() != 4 || value_codes.dimensions().size() != 4 ||
      value_steps.dimensions().size() != 4) {
    return Invalid("queries need three axes, and the cache needs four");
  }
  const int64_t rows = queries.dimensions()[0], heads = queries.dimensions()[1], size = queries.dimensions()[2];
  const int64_t groups = keys.dimensions()[1], residual = keys.dimensions()[2];
  if (group_size != 32 && group_size != 64 && group_size != 128) return Invalid("need groups of 32, 64 or 128");
  if (size != 64 && size != 128) return Invalid("need heads of 64 or 128 channels");
  const int64_t key_positions = key_steps.dimensions()[3] * group_size, value_positions = value_codes.dimensions()[2];
  if (key_positions == 0 || value_positions == 0 || residual == 0 || groups == 0) return Invalid("the cache is empty");
  const int64_t key_bits = key_codes.dimensions()[3] * 8 / key_positions, value_bits = value_codes.dimensions()[3] * 8 / size;
  const int64_t value_groups = std::max<int64_t>(size / group_size, 1);
  if ((key_bits != 4 && key_bits != 2) || (value_bits != 4 && value_bits != 2)) return Invalid("need 4 or 2 bits");
  const bool rotates = cos.element_count() > 0;
  if (!HasShape(new_keys, {rows, groups, size}) || !HasShape(new_values, {rows, groups, size}) ||
      !HasShape(keys, {rows, groups, residual, size}) || !HasShape(values, {rows, groups, residual, size}) ||
      !HasShape(key_codes, {rows, groups, size, key_positions / 8 * key_bits}) ||
      !HasShape(key_steps, {rows, groups, size, key_positions / group_size}) ||
      !HasShape(key_lowest, {rows, groups, size, key_positions / group_size}) ||
      !HasShape(value_codes, {rows, groups, value_positions, size / 8 * value_bits}) ||
      !HasShape(value_steps, {rows, groups, value_positions, value_groups}) ||
      !HasShape(value_lowest, {rows, groups, value_positions, value_groups}) || !HasShape(*mixed, {rows, heads, size}) ||
      length.element_count() != 1 || !HasShape(positions, {rows}) || !HasShape(start, {rows}) ||
      (rotates && (!HasShape(cos, {rows, size / 2}) || !HasShape(sin, {rows, size / 2}))) ||
      !HasShape(*partials, {rows, heads, any4::kMostParts, size + 2})) {
    return Invalid("the shapes of its operands don't fit together");
  }
  if (heads % groups != 0 || heads > 8 * groups) return Invalid("need up to 8 query heads for each key head");
  if (residual % 64 != 0 || key_positions % (2 * group_size) != 0 || value_positions % (2 * group_size) != 0) {
    return Invalid("need a ring of a multiple of 64 tokens, and codes of whole pairs of groups");
  }
  if (rows * groups > 65535 || key_positions > INT_MAX / 2 || value_positions > INT_MAX / 2 || residual > INT_MAX / size) {
    return Invalid("it is too large");
  }
  const auto moved = [](const auto& in, auto& out) { return in.untyped_data() != out->untyped_data(); };
  if (moved(keys, keys_out) || moved(values, values_out) || moved(key_codes, key_codes_out) ||
      moved(key_steps, key_steps_out) || moved(key_lowest, key_lowest_out) || moved(value_codes, value_codes_out) ||
      moved(value_steps, value_steps_out) || moved(value_lowest, value_lowest_out) || moved(length, length_out)) {
    return Invalid("the cache isn't updated in place");
  }
  if (rows == 0) return ffi::Error::Success();
  const auto number = [](int64_t n) { return static_cast<int>(std::min<int64_t>(n, INT_MAX)); };
  const any4::AttentionStep token{queries.untyped_data(),
                                  new_keys.untyped_data(),
                                  new_values.untyped_data(),
                                  keys_out->untyped_data(),
                                  values_out->untyped_data(),
                                  length_out->typed_data(),
                                  positions.typed_data(),
                                  start.typed_data(),
                                  rotates ? cos.typed_data() : nullptr,
                                  rotates ? sin.typed_data() : nullptr,
                                  mixed->untyped_data(),
                                  partials->typed_data(),
                                  number(rows),
                                  number(heads),
                                  number(groups),
                                  number(size),
                                  number(residual),
                                  scale,
                                  softcap,
                                  number(window)};
  const any4::KiviStep step{token,
                            key_codes_out->typed_data(),
                            key_steps_out->untyped_data(),
                            key_lowest_out->untyped_data(),
                            value_codes_out->typed_data(),
                            value_steps_out->untyped_data(),
                            value_lowest_out->untyped_data(),
                            number(key_bits),
                            number(value_bits),
                            number(group_size),
                            number(key_positions),
                            number(value_positions)};
  return any4::Done(kTarget,
                    type == ffi::BF16 ? any4::AttendKiviBfloat16(step, stream) : any4::AttendKiviFloat16(step, stream));
}

}  // namespace

// kCmdBufferCompatible: XLA may capture it in a CUDA graph.
XLA_FFI_DEFINE_HANDLER_SYMBOL(any4_cuda_kivi_attention, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Arg<Bytes>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Arg<Bytes>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Ints>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Any>()
                                  .Ret<Any>()
                                  .Ret<Any>()
                                  .Ret<Bytes>()
                                  .Ret<Any>()
                                  .Ret<Any>()
                                  .Ret<Bytes>()
                                  .Ret<Any>()
                                  .Ret<Any>()
                                  .Ret<Ints>()
                                  .Ret<Floats>()
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("group_size"),
                              {ffi::Traits::kCmdBufferCompatible});
