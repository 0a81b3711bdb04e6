// Eight lanes take a row of W, and a few rows of x, whose inputs they gather from the cache.
#include "sparse_product.h"

#include <algorithm>

#include "entries.cuh"

namespace any4 {
namespace {

constexpr int kThreads = 256;

template <int kRows, typename T>
__global__ void __launch_bounds__(kThreads) Multiply(const Entries entries, const T* __restrict__ x, int m,
                                                     T* __restrict__ y) {
  const int64_t row = (int64_t{blockIdx.x} * kThreads + threadIdx.x) / kRowLanes;
  const int first = static_cast<int>(blockIdx.y) * kRows;
  // Where too few rows are left, the last is repeated, and the surplus is never stored.
  const int64_t of_w = min(row, entries.n - 1);
  const auto input = [&](int r, uint32_t column) {
    return static_cast<float>(x[min(first + r, m - 1) * entries.k + column]);
  };
  float sums[kRows] = {};
  SumEntries(entries, of_w, input, sums);
  if (threadIdx.x % kRowLanes != 0 || row >= entries.n) return;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (first + r < m) y[(first + r) * entries.n + row] = static_cast<T>(sums[r]);
  }
}

template <int kRows, typename T>
cudaError_t LaunchRows(const Entries& entries, const void* x, int64_t m, void* y, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>((entries.n * kRowLanes + kThreads - 1) / kThreads),
                  static_cast<unsigned>((m + kRows - 1) / kRows));
  Multiply<kRows><<<grid, kThreads, 0, stream>>>(entries, static_cast<const T*>(x), static_cast<int>(m),
                                                 static_cast<T*>(y));
  return cudaGetLastError();
}

template <typename T>
cudaError_t Launch(const Entries& entries, const void* x, int64_t m, void* y, cudaStream_t stream) {
  if (m == 1) return LaunchRows<1, T>(entries, x, m, y, stream);
  if (m <= 4) return LaunchRows<4, T>(entries, x, m, y, stream);
  return LaunchRows<8, T>(entries, x, m, y, stream);
}

}  // namespace

cudaError_t SparseProduct(const Entries& entries, const void* x, int64_t m, Type type, void* y, cudaStream_t stream) {
  switch (type) {
    case Type::kBfloat16: return Launch<__nv_bfloat16>(entries, x, m, y, stream);
    case Type::kFloat16: return Launch<__half>(entries, x, m, y, stream);
    default: return Launch<float>(entries, x, m, y, stream);
  }
}

}  // namespace any4
