// LutTurns for x in float16: 4-bit codes in groups of 128.
#include "lut_turns_launch.cuh"

namespace any4 {

cudaError_t LaunchTurnsFloat16(const LutLaunch& launch, cudaStream_t stream) {
  return LaunchGroups<__half, 1>(launch, stream);
}

}  // namespace any4
