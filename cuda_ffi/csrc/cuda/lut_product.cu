// LutProduct: the kernel for turns where the operands allow it, else the general one, whose grid is chosen here.
#include "lut_product.h"

#include <algorithm>

#include "lut_general.cuh"
#include "lut_launch.h"

namespace any4 {
namespace {

template <typename T, int kBits>
cudaError_t Launch(const LutWeight& w, const Columns& columns, const void* x, void* y, cudaStream_t stream) {
  const int64_t blocks = (w.n + kTileRows - 1) / kTileRows, count = static_cast<int64_t>(columns.m) << columns.split;
  const int warps = WarpsOfBlock(blocks, (w.k + kTileInputs - 1) / kTileInputs, 16);
  const dim3 grid(static_cast<unsigned>(blocks),
                  static_cast<unsigned>((count + kGeneralColumns - 1) / kGeneralColumns));
  LutGeneral<T, kBits><<<grid, dim3(32, warps), warps * kGeneralColumns * kTileRows * sizeof(float), stream>>>(
      w, static_cast<const T*>(x), static_cast<T*>(y), columns);
  return cudaGetLastError();
}

template <typename T>
cudaError_t OfBits(const LutWeight& w, int bits, const Columns& columns, const void* x, void* y, cudaStream_t stream) {
  switch (bits) {
    case 2: return Launch<T, 2>(w, columns, x, y, stream);
    case 3: return Launch<T, 3>(w, columns, x, y, stream);
    case 4: return Launch<T, 4>(w, columns, x, y, stream);
    default: return Launch<T, 8>(w, columns, x, y, stream);
  }
}

}  // namespace

int Multiprocessors() {
  int device = 0, count = 1;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}

int WarpsOfBlock(int64_t blocks, int64_t turns, int resident) {
  const int64_t wanted = blocks <= resident / 8 * Multiprocessors() ? 8 : 4;
  return static_cast<int>(std::max<int64_t>(1, std::min(wanted, turns)));
}

cudaError_t LutProduct(const LutWeight& w, int bits, int64_t group_size, const void* x, void* y, int64_t m, Type type,
                       cudaStream_t stream) {
  if (IsForTurns(w, bits, group_size, m)) return LaunchTurns(w, group_size, x, y, m, type, stream);
  Columns columns{static_cast<int>(m), 0, 0};
  while (kTileInputs >> columns.split > group_size) ++columns.split;
  while (static_cast<int64_t>(kTileInputs) << columns.group_shift < std::min(group_size, w.k)) ++columns.group_shift;
  return type == Type::kFloat16 ? OfBits<__half>(w, bits, columns, x, y, stream)
                                : OfBits<__nv_bfloat16>(w, bits, columns, x, y, stream);
}

}  // namespace any4
