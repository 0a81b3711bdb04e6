// XLA's entry point to the k-means solver: it checks what Python passed before it launches anything.
#include <climits>
#include <string_view>

#include "handler.h"
#include "kmeans.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

constexpr std::string_view kTarget = "any4_cuda_kmeans";

ffi::Error Invalid(std::string_view what) { return any4::Invalid(kTarget, what); }

// `weights` are absent where they have no elements; weights [K] serve every row.
ffi::Error KMeans(cudaStream_t stream, ffi::ScratchAllocator scratch, ffi::Buffer<ffi::F32> rows,
                  ffi::Buffer<ffi::F32> weights, ffi::Result<ffi::Buffer<ffi::F32>> centroids,
                  ffi::Result<ffi::Buffer<ffi::U8>> codes, ffi::Result<ffi::Buffer<ffi::F32>> inertia) {
  if (rows.dimensions().size() != 2 || centroids->dimensions().size() != 2) {
    return Invalid("rows and centroids need two axes");
  }
  const int64_t count = rows.dimensions()[0], length = rows.dimensions()[1], k = centroids->dimensions()[1];
  const auto weight_axes = weights.dimensions().size();
  const auto weight_count = static_cast<int64_t>(weights.element_count());
  // Positions in a row's table are 32-bit numbers.
  if (length < 1 || length > INT_MAX / 64 || k < 1 || k > 256 || centroids->dimensions()[0] != count ||
      static_cast<int64_t>(codes->element_count()) != count * length ||
      static_cast<int64_t>(inertia->element_count()) != count ||
      (weight_count > 0 && weight_count != (weight_axes == 1 ? length : count * length))) {
    return Invalid("the shapes of its operands don't fit together");
  }
  if (count == 0) return ffi::Error::Success();
  const any4::KMeansRows taken{rows.typed_data(),
                               weight_count == 0 ? nullptr : weights.typed_data(),
                               weight_axes == 1 ? 0 : length,
                               count,
                               static_cast<int>(length),
                               static_cast<int>(k)};
  const any4::KMeansResult result{centroids->typed_data(), codes->typed_data(), inertia->typed_data()};
  const any4::Slots slots = any4::KMeansSlots(taken);
  return any4::LaunchInSlots(kTarget, scratch, slots,
                             [&](void* memory) { return any4::SolveKMeans(taken, result, slots, memory, stream); });
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(any4_cuda_kmeans, KMeans,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::PlatformStream<cudaStream_t>>()
                                  .Ctx<ffi::ScratchAllocator>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::U8>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
