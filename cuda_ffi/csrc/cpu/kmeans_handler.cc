// XLA's way in to the k-means solver: checks what Python passed, and shares the rows among the threads of XLA's pool.
#include <algorithm>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "isa.h"
#include "kmeans.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;

ffi::Error Invalid(const std::string& message) { return ffi::Error::InvalidArgument("any4_cpu_kmeans: " + message); }

const any4::KMeansKernel* KernelOf(any4::Isa isa) {
  const any4::KMeansKernel* const kernel = isa == any4::Isa::kAvx512  ? any4::Avx512KMeans()
                                           : isa == any4::Isa::kAvx2 ? any4::Avx2KMeans()
                                                                     : nullptr;
  return kernel != nullptr ? kernel : any4::PortableKMeans();
}

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
  if (!isa) return Invalid("got isa=" + std::string(isa_name) + ", which this processor doesn't have; pass \"auto\"");
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
  const any4::KMeansKernel& kernel = *KernelOf(*isa);
  const int64_t bytes = kernel.scratch_bytes(length, options);
  const int64_t row_weights = weight_count == 0 ? 0 : weight_axes == 1 ? 0 : length;

  any4::Executor executor;
  executor.threads = std::max<int64_t>(pool.num_threads(), 1);
  executor.spawn = [&pool](std::function<void()> task) { pool.Schedule(std::move(task)); };
  // A few tasks a thread, so that scratch is rarely allocated and no thread waits long for the last one.
  const int64_t tasks = std::min(count, 4 * executor.threads);
  any4::ParallelFor(executor, tasks, [&](int64_t task) {
    constexpr std::align_val_t kAlignment{64};
    const std::unique_ptr<char, void (*)(char*)> scratch(static_cast<char*>(::operator new(bytes, kAlignment)),
                                                         [](char* memory) { ::operator delete(memory, kAlignment); });
    for (int64_t r = count * task / tasks; r < count * (task + 1) / tasks; ++r) {
      const float* const row_weight = weight_count == 0 ? nullptr : weights.typed_data() + r * row_weights;
      kernel.solve({rows.typed_data() + r * length, row_weight, length}, options, scratch.get(),
                   {centroids->typed_data() + r * k, codes->typed_data() + r * length, inertia->typed_data() + r});
    }
  });
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
