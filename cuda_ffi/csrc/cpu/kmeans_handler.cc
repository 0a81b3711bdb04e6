// XLA's way in to the k-means solver: checks what Python passed, and shares the rows out among XLA's threads.
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "handler.h"
#include "isa.h"
#include "kmeans.h"
#include "rows.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

ffi::Error Invalid(const std::string& message) { return ffi::Error::InvalidArgument("any4_cpu_kmeans: " + message); }

std::optional<any4::KMeansStart> StartNamed(std::string_view name) {
  using any4::KMeansStart;
  for (auto [known, start] : {std::pair{std::string_view("none"), KMeansStart::kNone},
                              {std::string_view("plus_plus"), KMeansStart::kPlusPlus},
                              {std::string_view("random"), KMeansStart::kRandom},
                              {std::string_view("spread"), KMeansStart::kSpread},
                              {std::string_view("quantile"), KMeansStart::kQuantile}}) {
    if (name == known) return start;
  }
  return std::nullopt;
}

bool Fits(any4::KMeansStart start, const ffi::Span<const int64_t>& numbers, int64_t clusters, int64_t length) {
  switch (start) {
    case any4::KMeansStart::kNone: return true;
    case any4::KMeansStart::kPlusPlus:
      return numbers.size() == 2 && numbers[0] == clusters && numbers[1] >= 1 && numbers[1] <= any4::kMaxTrials;
    case any4::KMeansStart::kRandom: return numbers.size() == 1 && numbers[0] >= length;
    case any4::KMeansStart::kSpread:
    case any4::KMeansStart::kQuantile: return numbers.size() == 1 && numbers[0] == clusters;
  }
  return false;
}

// `weights` of no elements stand for absent ones; [K] are every row's.
ffi::Error KMeans(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> rows, ffi::Buffer<ffi::F32> weights,
                  ffi::Buffer<ffi::F32> numbers, ffi::Buffer<ffi::F32> tol,
                  ffi::Result<ffi::Buffer<ffi::F32>> centroids, ffi::Result<ffi::Buffer<ffi::U8>> codes,
                  ffi::Result<ffi::Buffer<ffi::F32>> inertia,
                  std::string_view start_name, int64_t max_iter, std::string_view isa_name) {
  const auto isa = any4::IsaNamed(isa_name);
  if (!isa) return Invalid(any4::LacksIsa(isa_name));
  const auto start = StartNamed(start_name);
  if (!start) return Invalid("got start=" + std::string(start_name) + ", which is none of its starts");
  if (rows.dimensions().size() != 2 || centroids->dimensions().size() != 2 || tol.element_count() != 1) {
    return Invalid("rows and centroids need two axes, and tol none");
  }
  const int64_t count = rows.dimensions()[0], length = rows.dimensions()[1], k = centroids->dimensions()[1];
  const auto weight_axes = weights.dimensions().size();
  const auto weight_count = static_cast<int64_t>(weights.element_count());
  if (length < 1 || length > INT32_MAX / 2 || k < 1 || k > 256 || centroids->dimensions()[0] != count ||
      static_cast<int64_t>(codes->element_count()) != count * length ||
      static_cast<int64_t>(inertia->element_count()) != count ||
      (weight_count > 0 && weight_count != (weight_axes == 1 ? length : count * length)) ||
      !Fits(*start, numbers.dimensions(), k, length)) {
    return Invalid("the shapes of its operands don't fit together");
  }
  const any4::KMeansOptions options{k, *start, numbers.typed_data(),
                                    numbers.dimensions().size() == 2 ? numbers.dimensions()[1] : 0, max_iter,
                                    tol.typed_data()[0]};
  const auto& kernel = any4::KernelFor(*isa, any4::PortableKMeans(), any4::Avx2KMeans(), any4::Avx512KMeans());
  const int64_t weight_stride = weight_axes == 1 ? 0 : length;
  const auto solve = [&](int64_t begin, int64_t end, char* scratch) {
    for (int64_t r = begin; r < end; ++r) {
      const float* const row_weights = weight_count == 0 ? nullptr : weights.typed_data() + r * weight_stride;
      kernel.solve({rows.typed_data() + r * length, row_weights, length}, options, scratch,
                   {centroids->typed_data() + r * k, codes->typed_data() + r * length, inertia->typed_data() + r});
    }
  };
  any4::ForRows(any4::ExecutorOf(pool), count, kernel.scratch_bytes(length, options), solve);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(any4_cpu_kmeans, KMeans,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::U8>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Attr<std::string_view>("start")
                                  .Attr<int64_t>("max_iter")
                                  .Attr<std::string_view>("isa"));
