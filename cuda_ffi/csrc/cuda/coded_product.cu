// CodedProduct: chooses the instance of CodedTurns.
#include "coded_product.h"

#include "coded_turns.cuh"
#include "device.h"

namespace any4 {
namespace {

template <typename Codes, int kTiles>
cudaError_t Launch(const CodedWeight& weight, const void* x, int64_t m, void* y, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(weight.codes.n / (kTiles * kTileRows)), static_cast<unsigned>(m));
  const auto bytes = static_cast<int>(CodedBytes(weight.codes.k));
  const cudaError_t error =
      cudaFuncSetAttribute(CodedTurns<Codes, kTiles>, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error != cudaSuccess) return error;
  CodedTurns<Codes, kTiles><<<grid, 32 * kCodedWarps, bytes, stream>>>(weight, static_cast<const __nv_bfloat16*>(x),
                                                                       static_cast<__nv_bfloat16*>(y));
  return cudaGetLastError();
}

template <typename Codes>
cudaError_t OfRows(const CodedWeight& weight, const void* x, int64_t m, void* y, cudaStream_t stream) {
  // Blocks of more rows read more of each line of memory; those of fewer occupy more multiprocessors.
  const int64_t n = weight.codes.n;
  if (n % 64 == 0 && m * n / 64 * 10 >= Multiprocessors() * 9) return Launch<Codes, 4>(weight, x, m, y, stream);
  return Launch<Codes, 2>(weight, x, m, y, stream);
}

}  // namespace

cudaError_t CodedProduct(const CodedWeight& weight, const void* x, int64_t m, void* y, cudaStream_t stream) {
  return weight.ramp ? OfRows<Ramp>(weight, x, m, y, stream) : OfRows<Table>(weight, x, m, y, stream);
}

}  // namespace any4
