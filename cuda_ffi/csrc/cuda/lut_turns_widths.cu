// LutTurns for x in bfloat16 and codes of 2, 3 and 8 bits.
#include "lut_turns_launch.cuh"

namespace any4 {
namespace {

using T = __nv_bfloat16;

template <int kBits, bool kOffsets>
cudaError_t OfRows(const LutLaunch& launch, cudaStream_t stream) {
  const int warps = WarpsOfBlock(launch.Blocks(kTileRows), launch.k() / (2 * kTileInputs), 16);
  return launch.m > 1 ? LaunchInstance<T, TurnsOf<kBits, 8, 1, 0, kOffsets>>(launch, warps, stream)
                      : LaunchInstance<T, TurnsOf<kBits, 1, 1, 0, kOffsets>>(launch, warps, stream);
}

template <int kBits>
cudaError_t OfOffsets(const LutLaunch& launch, cudaStream_t stream) {
  return launch.ws[0].offsets == nullptr ? OfRows<kBits, false>(launch, stream) : OfRows<kBits, true>(launch, stream);
}

}  // namespace

cudaError_t LaunchTurnsWidths(const LutLaunch& launch, cudaStream_t stream) {
  switch (launch.bits) {
    case 2: return OfOffsets<2>(launch, stream);
    case 3: return OfOffsets<3>(launch, stream);
    default: return OfOffsets<8>(launch, stream);
  }
}

}  // namespace any4
