// Chooses the instance of BinaryTurns.
#include "binary_product.h"

#include "binary_turns.cuh"

namespace any4 {
namespace {

template <typename T, int kPlanes>
cudaError_t LaunchPlanes(const BinaryWeight& weight, const void* x, int64_t m, void* y, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((weight.n + kBinaryRows - 1) / kBinaryRows);
  // Two rows of x cost as much as one, where there is room for them.
  constexpr int64_t kMostOfTwo = 16384;
  const int inputs = m == 1 || weight.k > kMostOfTwo ? 1 : kBinaryInputs;
  const auto bytes = static_cast<int>(BinaryBytes(weight.k, inputs));
  const cudaError_t error = cudaFuncSetAttribute(BinaryTurns<T, kPlanes>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(blocks, static_cast<unsigned>((m + inputs - 1) / inputs));
  BinaryTurns<T, kPlanes><<<grid, 32 * kBinaryWarps, bytes, stream>>>(weight, static_cast<const T*>(x),
                                                                     static_cast<int>(m), inputs, static_cast<T*>(y));
  return cudaGetLastError();
}

template <typename T>
cudaError_t Launch(const BinaryWeight& weight, const void* x, int64_t m, void* y, cudaStream_t stream) {
  switch (weight.count) {
    case 1: return LaunchPlanes<T, 1>(weight, x, m, y, stream);
    case 2: return LaunchPlanes<T, 2>(weight, x, m, y, stream);
    case 3: return LaunchPlanes<T, 3>(weight, x, m, y, stream);
    default: return LaunchPlanes<T, 4>(weight, x, m, y, stream);
  }
}

}  // namespace

cudaError_t BinaryProduct(const BinaryWeight& weight, const void* x, int64_t m, Type type, void* y,
                          cudaStream_t stream) {
  return type == Type::kBfloat16 ? Launch<__nv_bfloat16>(weight, x, m, y, stream)
                                 : Launch<__half>(weight, x, m, y, stream);
}

}  // namespace any4
