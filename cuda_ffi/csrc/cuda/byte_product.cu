// Chooses the instance of ByteTurns and its grid.
#include "byte_product.h"

#include "byte_turns.cuh"
#include "device.h"
#include "lut_launch.h"

namespace any4 {
namespace {

template <typename Of>
cudaError_t LaunchInstance(const LutLaunch& launch, int warps, cudaStream_t stream) {
  int group_shift = 0;
  for (int64_t inputs = kTurnInputs / 4; inputs < launch.group_size && inputs < launch.k(); inputs *= 2) ++group_shift;
  const dim3 grid(static_cast<unsigned>(launch.Blocks(Of::kTiles * kTileRows)),
                  static_cast<unsigned>((launch.m + Of::kRows - 1) / Of::kRows));
  ByteTurns<Of><<<grid, dim3(32, warps), 0, stream>>>(
      launch.Batch(Of::kTiles * kTileRows), Shares(launch.k() / kTurnInputs, warps),
      static_cast<const __nv_bfloat16*>(launch.x), static_cast<int>(launch.m), group_shift);
  return cudaGetLastError();
}

template <int kLimbs, bool kOffsets>
cudaError_t OfRows(const LutLaunch& launch, cudaStream_t stream) {
  const int64_t tiles = launch.Blocks(kTileRows);
  const int warps = WarpsOfBlock(tiles, launch.k() / kTurnInputs, 16);
  if (launch.m > 1) return LaunchInstance<RoundedOf<kLimbs, 1, 2, kOffsets>>(launch, warps, stream);
  // One tile where all blocks are resident at once; two round x for half as many blocks.
  if (tiles <= 4 * Multiprocessors()) return LaunchInstance<RoundedOf<kLimbs, 1, 1, kOffsets>>(launch, warps, stream);
  return LaunchInstance<RoundedOf<kLimbs, 2, 1, kOffsets>>(launch, warps, stream);
}

template <int kLimbs>
cudaError_t OfOffsets(const LutLaunch& launch, cudaStream_t stream) {
  return launch.ws[0].offsets == nullptr ? OfRows<kLimbs, false>(launch, stream)
                                         : OfRows<kLimbs, true>(launch, stream);
}

}  // namespace

bool IsForBytes(const LutWeight& w, int64_t group_size) {
  const bool halves = w.scale_type == Type::kBfloat16 && w.offset_type == Type::kBfloat16;
  const bool groups = group_size >= w.k || (group_size >= 64 && (group_size & (group_size - 1)) == 0);
  return w.lut_type == Type::kInt8 && halves && groups && w.k % kTurnInputs == 0 && w.n % (2 * kTileRows) == 0;
}

cudaError_t ByteProducts(const LutWeight* ws, void* const* ys, int count, int64_t group_size, const void* x, int64_t m,
                         Inputs inputs, cudaStream_t stream) {
  for (int first = 0, last; first < count; first = last) {
    last = first + 1;
    // Weights without offsets need another instance of the kernel than those with.
    const auto alike = [&](int i) { return (ws[i].offsets == nullptr) == (ws[first].offsets == nullptr); };
    while (last < count && last - first < kMostTogether && alike(last)) ++last;
    const LutLaunch launch{ws + first, ys + first, last - first, 4, group_size, x, m, Type::kBfloat16};
    const cudaError_t error = inputs == Inputs::kBytes ? OfOffsets<1>(launch, stream) : OfOffsets<2>(launch, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace any4
