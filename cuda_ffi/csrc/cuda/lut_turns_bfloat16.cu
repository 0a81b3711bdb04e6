// LutTurns for x in bfloat16 and 4-bit codes.
#include "lut_turns_launch.cuh"

namespace any4 {

cudaError_t LaunchTurnsBfloat16(const LutLaunch& launch, cudaStream_t stream) {
  using T = __nv_bfloat16;
  if (launch.ws[0].scale_type == Type::kE8m0) return LaunchRows<T, 4, false, true>(launch, stream);
  switch (launch.group_size) {
    case 32: return LaunchGroups<T, 4>(launch, stream);
    case 64: return LaunchGroups<T, 2>(launch, stream);
    case 128: return LaunchGroups<T, 1>(launch, stream);
    default: return LaunchGroups<T, 0>(launch, stream);
  }
}

}  // namespace any4
