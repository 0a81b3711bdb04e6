// XLA's entry point to decode attention: it checks what Python passed before it launches anything.
#include <algorithm>
#include <climits>
#include <string_view>

#include "attention.h"
#include "handler.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

using any4::HasShape;
using Any = ffi::AnyBuffer;
using Floats = ffi::Buffer<ffi::F32>;
using Ints = ffi::Buffer<ffi::S32>;

constexpr std::string_view kTarget = "any4_cuda_attention";

ffi::Error Invalid(std::string_view what) { return any4::Invalid(kTarget, what); }

// `cos` and `sin` are absent where they have no elements. The results but `mixed` and `partials` are the operands' memory.
ffi::Error Attend(cudaStream_t stream, Any queries, Any new_keys, Any new_values, Any keys, Any values, Ints length,
                  Ints positions, Ints start, Floats cos, Floats sin, ffi::Result<Any> mixed,
                  ffi::Result<Any> keys_out, ffi::Result<Any> values_out, ffi::Result<Ints> length_out,
                  ffi::Result<Floats> partials, float scale,
                  float softcap, int64_t window) {
  const ffi::DataType type = queries.element_type();
  for (const Any& each : {new_keys, new_values, keys, values, *mixed, *keys_out, *values_out}) {
    if (each.element_type() != type) return Invalid("its operands differ in dtype");
  }
  if (type != ffi::BF16 && type != ffi::F16) return Invalid("need bfloat16 or float16");
  if (queries.dimensions().size() != 3 || new_keys.dimensions().size() != 3 || keys.dimensions().size() != 3) {
    return Invalid("queries, keys and the cache need three axes");
  }
  const int64_t rows = queries.dimensions()[0], heads = queries.dimensions()[1], size = queries.dimensions()[2];
  const int64_t groups = new_keys.dimensions()[1], slots = keys.dimensions()[2];
  const bool rotates = cos.element_count() > 0;
  if (!HasShape(new_keys, {rows, groups, size}) || !HasShape(new_values, {rows, groups, size}) ||
      !HasShape(keys, {rows * groups, size, slots}) || !HasShape(values, {rows * groups, slots, size}) ||
      !HasShape(*keys_out, {rows * groups, size, slots}) || !HasShape(*values_out, {rows * groups, slots, size}) ||
      !HasShape(*mixed, {rows, heads, size}) || length.element_count() != 1 ||
      length_out->element_count() != 1 || !HasShape(positions, {rows}) ||
      !HasShape(start, {rows}) || (rotates && (!HasShape(cos, {rows, size / 2}) || !HasShape(sin, {rows, size / 2}))) ||
      !HasShape(*partials, {rows, heads, any4::kMostParts, size + 2})) {
    return Invalid("the shapes of its operands don't fit together");
  }
  if (groups == 0 || heads % groups != 0) return Invalid("the query heads are no multiple of the key heads");
  if (size % 16 != 0 || size > any4::kMostSize || slots % 8 != 0) {
    return Invalid("need channels in multiples of 16 up to 256, and slots in multiples of 8");
  }
  // Limits of a grid, and of offsets within the row of a cache.
  if (rows * groups > 65535 || slots > INT_MAX / 2 || heads / groups > 65535) return Invalid("it is too large");
  if (keys.untyped_data() != keys_out->untyped_data() || values.untyped_data() != values_out->untyped_data() ||
      length.untyped_data() != length_out->untyped_data()) {
    return Invalid("the cache isn't updated in place");
  }
  if (rows == 0 || size == 0 || slots == 0) return ffi::Error::Success();
  const any4::AttentionStep step{queries.untyped_data(),
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
                                 static_cast<int>(rows),
                                 static_cast<int>(heads),
                                 static_cast<int>(groups),
                                 static_cast<int>(size),
                                 static_cast<int>(slots),
                                 scale,
                                 softcap,
                                 static_cast<int>(std::min<int64_t>(window, INT_MAX))};
  return any4::Done(kTarget, type == ffi::BF16 ? any4::AttendBfloat16(step, stream) : any4::AttendFloat16(step, stream));
}

}  // namespace

// kCmdBufferCompatible: XLA may capture it in a CUDA graph.
XLA_FFI_DEFINE_HANDLER_SYMBOL(any4_cuda_attention, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Arg<Any>()
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
                                  .Ret<Ints>()
                                  .Ret<Floats>()
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("window"),
                              {ffi::Traits::kCmdBufferCompatible});
