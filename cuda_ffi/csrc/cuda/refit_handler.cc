// XLA's entry point to the refit: it checks what Python passed before it launches anything.
#include <algorithm>
#include <climits>
#include <string_view>

#include "handler.h"
#include "refit.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

using any4::HasShape;

constexpr std::string_view kTarget = "any4_cuda_refit";

ffi::Error Invalid(std::string_view what) { return any4::Invalid(kTarget, what); }

bool IsMantissa(int64_t bits) { return bits == 7 || bits == 10 || bits == 23; }

// `offsets` are absent where they have no elements, in the result as well.
ffi::Error Refit(cudaStream_t stream, ffi::ScratchAllocator scratch, ffi::Buffer<ffi::F32> w,
                 ffi::Buffer<ffi::F32> importance, ffi::Buffer<ffi::F32> lut, ffi::Buffer<ffi::F32> scales,
                 ffi::Buffer<ffi::F32> offsets, ffi::Result<ffi::Buffer<ffi::F32>> new_lut,
                 ffi::Result<ffi::Buffer<ffi::F32>> new_scales, ffi::Result<ffi::Buffer<ffi::F32>> new_offsets,
                 int64_t group_size, int64_t searches, int64_t max_rounds, int64_t first, int64_t stop, float settled,
                 ffi::Span<const float> factors, ffi::Span<const float> held, int64_t fits,
                 ffi::Span<const int64_t> mantissas) {
  if (w.dimensions().size() != 2 || lut.dimensions().size() != 2) return Invalid("w and lut need two axes");
  const int64_t count = w.dimensions()[0], length = w.dimensions()[1], levels = lut.dimensions()[1];
  if (length < 1 || length > INT_MAX / 2 || group_size < 1 || group_size > length) {
    return Invalid("need groups of 1 to K inputs");
  }
  const int64_t groups = (length + group_size - 1) / group_size;
  const bool has_offsets = offsets.element_count() > 0;
  if ((levels != 4 && levels != 8 && levels != 16) || first < 0 || stop > levels) {
    return Invalid("need tables of 4, 8 or 16 entries, and a range of them");
  }
  if (!HasShape(importance, {length}) || !HasShape(lut, {count, levels}) || !HasShape(scales, {count, groups}) ||
      !HasShape(*new_lut, {count, levels}) || !HasShape(*new_scales, {count, groups}) ||
      (has_offsets && (!HasShape(offsets, {count, groups}) || !HasShape(*new_offsets, {count, groups})))) {
    return Invalid("the shapes of its operands don't fit together");
  }
  if (factors.size() > any4::kMostStarts || held.size() != factors.size() || mantissas.size() != 3 ||
      !(mantissas[0] == 0 || IsMantissa(mantissas[0])) ||
      !std::all_of(mantissas.begin() + 1, mantissas.end(), IsMantissa)) {
    return Invalid(
        "need up to 64 pairs of factors and held points, and dtypes of 23, 10 or 7 bits of mantissa, or a lut of none");
  }
  if (count == 0) return ffi::Error::Success();
  const any4::RefitRows rows{w.typed_data(),
                             importance.typed_data(),
                             lut.typed_data(),
                             scales.typed_data(),
                             has_offsets ? offsets.typed_data() : nullptr,
                             count,
                             static_cast<int>(length),
                             static_cast<int>(group_size),
                             static_cast<int>(groups),
                             static_cast<int>(levels)};
  any4::RefitOptions options{};
  options.searches = static_cast<int>(std::min<int64_t>(searches, INT_MAX));
  options.max_rounds = static_cast<int>(std::min<int64_t>(max_rounds, INT_MAX));
  options.first = static_cast<int>(first);
  options.stop = static_cast<int>(stop);
  options.settled = settled;
  options.starts = static_cast<int>(factors.size());
  options.fits = static_cast<int>(fits);
  std::copy(factors.begin(), factors.end(), options.factors);
  std::copy(held.begin(), held.end(), options.held);
  options.lut_mantissa = static_cast<int>(mantissas[0]);
  options.scale_mantissa = static_cast<int>(mantissas[1]);
  options.offset_mantissa = static_cast<int>(mantissas[2]);
  const any4::RefitResult result{new_lut->typed_data(), new_scales->typed_data(), new_offsets->typed_data()};
  const any4::Slots slots = any4::RefitSlots(rows);
  return any4::LaunchInSlots(kTarget, scratch, slots,
                             [&](void* memory) { return any4::Refit(rows, options, result, slots, memory, stream); });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(any4_cuda_refit, Refit,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<ffi::ScratchAllocator>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<int64_t>("group_size")
                                  .Attr<int64_t>("searches")
                                  .Attr<int64_t>("max_rounds")
                                  .Attr<int64_t>("first")
                                  .Attr<int64_t>("stop")
                                  .Attr<float>("settled")
                                  .Attr<ffi::Span<const float>>("factors")
                                  .Attr<ffi::Span<const float>>("held")
                                  .Attr<int64_t>("fits")
                                  .Attr<ffi::Span<const int64_t>>("mantissas"));
