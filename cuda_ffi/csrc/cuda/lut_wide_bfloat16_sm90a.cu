// LutWide for x in bfloat16.
#include "lut_wide_launch.cuh"

namespace any4 {

cudaError_t LaunchWideBfloat16(const WideLaunch& launch, cudaStream_t stream) {
  // The instance for two groups per step serves larger groups too.
  if (launch.w.scale_type == Type::kE8m0) return LaunchWideScales<__nv_bfloat16, 2, Type::kE8m0>(launch, stream);
  return LaunchWideGroups<__nv_bfloat16, Type::kBfloat16>(launch, stream);
}

}  // namespace any4
