// XLA's entry points: they check what Python passed before they launch anything.
#include <optional>
#include <string_view>
#include <vector>

#include "byte_product.h"
#include "handler.h"
#include "lut_product.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

std::optional<any4::Type> TypeOf(const ffi::AnyBuffer& buffer) {
  switch (buffer.element_type()) {
    case ffi::BF16: return any4::Type::kBfloat16;
    case ffi::F16: return any4::Type::kFloat16;
    case ffi::F32: return any4::Type::kFloat32;
    case ffi::U8: return any4::Type::kE8m0;
    case ffi::S8: return any4::Type::kInt8;
    default: return std::nullopt;
  }
}

bool IsHalf(std::optional<any4::Type> type) {
  return type == any4::Type::kBfloat16 || type == any4::Type::kFloat16;
}

bool IsFloating(std::optional<any4::Type> type) { return IsHalf(type) || type == any4::Type::kFloat32; }

using any4::HasShape;

constexpr std::string_view kTarget = "any4_cuda_lut";

ffi::Error Invalid(std::string_view what) { return any4::Invalid(kTarget, what); }

// The operands of each matrix: codes, high, lut, scales, offsets, index. `high`, `offsets` and `index` are absent where
// they have no elements; all but `index` have a leading axis, the stack.
constexpr size_t kOperands = 6;

// The weight of k inputs whose operands begin at `first`, to be decoded to `type`, or for ByteProducts as it is.
ffi::ErrorOr<any4::LutWeight> WeightOf(const ffi::RemainingArgs& operands, size_t first, int64_t k, int64_t bits,
                                       int64_t group_size, any4::Type type, bool bytes = false) {
  const auto invalid = [](std::string_view what) { return ffi::Unexpected(Invalid(what)); };
  const auto operand = [&](size_t i) { return *operands.get<ffi::AnyBuffer>(first + i); };
  const ffi::AnyBuffer codes = operand(0), high = operand(1), lut = operand(2), scales = operand(3),
                       offsets = operand(4), index = operand(5);
  if (bits != 2 && bits != 3 && bits != 4 && bits != 8) return invalid("need codes of 2, 3, 4 or 8 bits");
  // A group smaller than the row starts and ends at multiples of 16 inputs, half of a lane's, and a tile holds a power
  // of two of such groups.
  const bool whole = group_size >= k, power = group_size >= 16 && (group_size & (group_size - 1)) == 0;
  if (k % 32 != 0 || !(whole || power)) return invalid("need k % 32 == 0, and groups of a power of two from 16 on");
  if (codes.dimensions().size() != 3 || lut.dimensions().size() != 3 || scales.dimensions().size() != 3) {
    return invalid("codes, lut and scales need three axes");
  }
  any4::LutWeight w{};
  w.stack = codes.dimensions()[0];
  w.n = codes.dimensions()[1];
  w.k = k;
  w.groups = scales.dimensions()[2];
  // Up to 31 inputs may pad the row; they need no group.
  const auto groups = [&](int64_t inputs) { return whole ? 1 : (inputs + group_size - 1) / group_size; };
  const bool one = lut.dimensions()[1] == 1;
  const bool with_high = bits == 3, with_offsets = offsets.element_count() > 0;
  if (!HasShape(codes, {w.stack, w.n, k * (with_high ? 2 : bits) / 8}) ||
      (with_high && !HasShape(high, {w.stack, w.n, k / 8})) ||
      !HasShape(lut, {w.stack, one ? 1 : w.n, int64_t{1} << bits}) || w.groups < groups(k - 31) ||
      w.groups > groups(k) || !HasShape(scales, {w.stack, w.n, w.groups}) ||
      (with_offsets && !HasShape(offsets, {w.stack, w.n, w.groups})) || index.element_count() > 1) {
    return invalid("the shapes of its operands don't fit together");
  }
  const auto lut_type = TypeOf(lut), scale_type = TypeOf(scales), offset_type = TypeOf(offsets);
  const bool scaled = IsFloating(scale_type) || scale_type == any4::Type::kE8m0;
  if (!lut_type || !scaled || !IsFloating(offset_type) || codes.element_type() != ffi::U8 ||
      index.element_type() != ffi::S32) {
    return invalid("need codes uint8, index int32, scales and offsets bfloat16, float16, float32 or e8m0");
  }
  const bool integers = lut_type == any4::Type::kInt8;
  const bool held = integers || lut_type == type || (IsHalf(lut_type) && type == any4::Type::kFloat16);
  // ByteProducts asks for a table of int8 itself.
  if (!IsHalf(type) || !(bytes ? bits == 4 : held)) {
    return invalid("need x and y of one type, bfloat16 with a table of it, float16 with one of either, or one of int8");
  }
  w.codes = static_cast<const uint8_t*>(codes.untyped_data());
  w.high = with_high ? static_cast<const uint8_t*>(high.untyped_data()) : nullptr;
  w.lut = lut.untyped_data();
  w.scales = scales.untyped_data();
  w.offsets = with_offsets ? offsets.untyped_data() : nullptr;
  w.index = index.element_count() > 0 ? static_cast<const int32_t*>(index.untyped_data()) : nullptr;
  w.lut_stride = one ? 0 : int64_t{1} << bits;
  w.lut_type = *lut_type;
  w.scale_type = *scale_type;
  w.offset_type = *offset_type;
  return w;
}

// The operands (x, matrix...) of products, and a result y for each matrix; of those with elements what a launch needs.
struct Batch {
  const void* x;
  int64_t m;
  any4::Type type;
  std::vector<any4::LutWeight> weights = {};
  std::vector<void*> ys = {};

  int count() const { return static_cast<int>(weights.size()); }
};

ffi::ErrorOr<Batch> BatchOf(const ffi::RemainingArgs& operands, const ffi::RemainingRets& results, int64_t bits,
                            int64_t group_size, bool bytes) {
  const auto invalid = [](std::string_view what) { return ffi::Unexpected(Invalid(what)); };
  if (results.size() == 0 || operands.size() != 1 + kOperands * results.size()) {
    return invalid("need x, and six operands for each result");
  }
  const ffi::AnyBuffer x = *operands.get<ffi::AnyBuffer>(0);
  const auto type = TypeOf(x);
  if (x.dimensions().size() != 2 || !type) return invalid("x needs two axes and bfloat16 or float16");
  Batch batch{x.untyped_data(), x.dimensions()[0], *type};
  for (size_t i = 0; i < results.size(); ++i) {
    const auto w = WeightOf(operands, 1 + i * kOperands, x.dimensions()[1], bits, group_size, *type, bytes);
    if (w.has_error()) return ffi::Unexpected(w.error());
    const ffi::AnyBuffer y = **results.get<ffi::AnyBuffer>(i);
    if (!HasShape(y, {batch.m, w->n}) || TypeOf(y) != type) return invalid("y needs the shape [M, N] and x's type");
    if (batch.m == 0 || w->n == 0) continue;
    batch.weights.push_back(*w);
    batch.ys.push_back(y.untyped_data());
  }
  return batch;
}

ffi::Error Products(cudaStream_t stream, ffi::RemainingArgs operands, ffi::RemainingRets results, int64_t bits,
                    int64_t group_size) {
  const auto batch = BatchOf(operands, results, bits, group_size, false);
  if (batch.has_error()) return batch.error();
  return any4::Done(kTarget, any4::LutProducts(batch->weights.data(), batch->ys.data(), batch->count(),
                                               static_cast<int>(bits), group_size, batch->x, batch->m, batch->type,
                                               stream));
}

// With x rounded to `limbs` bytes.
ffi::Error ByteProducts(cudaStream_t stream, ffi::RemainingArgs operands, ffi::RemainingRets results,
                        int64_t group_size, int64_t limbs) {
  const auto batch = BatchOf(operands, results, 4, group_size, true);
  if (batch.has_error()) return batch.error();
  if (limbs != 1 && limbs != 2) return Invalid("x is rounded to one byte or to two");
  for (const any4::LutWeight& w : batch->weights) {
    if (batch->type != any4::Type::kBfloat16 || !any4::IsForBytes(w, group_size)) {
      return Invalid("need a table of int8, the rest in bfloat16, k % 256 == 0, n % 32 == 0, groups of 64, 128, ...");
    }
  }
  return any4::Done(kTarget, any4::ByteProducts(batch->weights.data(), batch->ys.data(), batch->count(), group_size,
                                                batch->x, batch->m, static_cast<any4::Inputs>(limbs), stream));
}

// (matrix) -> W.
ffi::Error Dequantize(cudaStream_t stream, ffi::RemainingArgs operands, ffi::RemainingRets results, int64_t bits,
                      int64_t group_size) {
  if (results.size() != 1 || operands.size() != kOperands) return Invalid("need six operands and one result");
  const ffi::AnyBuffer out = **results.get<ffi::AnyBuffer>(0);
  const auto type = TypeOf(out);
  if (out.dimensions().size() != 2 || !type) return Invalid("the result needs two axes and bfloat16 or float16");
  const auto w = WeightOf(operands, 0, out.dimensions()[1], bits, group_size, *type);
  if (w.has_error()) return w.error();
  if (out.dimensions()[0] != w->n) return Invalid("the result needs the shape [N, K]");
  if (w->n == 0) return ffi::Error::Success();
  return any4::Done(kTarget, any4::LutDequantize(*w, static_cast<int>(bits), group_size, out.untyped_data(), *type, stream));
}

auto Operands() { return ffi::Ffi::Bind().Ctx<ffi::PlatformStream<cudaStream_t>>().RemainingArgs().RemainingRets(); }

auto Binding() { return Operands().Attr<int64_t>("bits").Attr<int64_t>("group_size"); }

auto ByteBinding() { return Operands().Attr<int64_t>("group_size").Attr<int64_t>("limbs"); }

}  // namespace

// kCmdBufferCompatible: XLA may capture them in a CUDA graph.
XLA_FFI_DEFINE_HANDLER_SYMBOL(any4_cuda_lut_product, Products, Binding(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(any4_cuda_lut_dequantize, Dequantize, Binding(), {ffi::Traits::kCmdBufferCompatible});
XLA_FFI_DEFINE_HANDLER_SYMBOL(any4_cuda_byte_product, ByteProducts, ByteBinding(), {ffi::Traits::kCmdBufferCompatible});
