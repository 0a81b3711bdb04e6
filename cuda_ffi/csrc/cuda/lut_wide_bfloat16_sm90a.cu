// LutWide for x of bfloat16.
#include "lut_wide_launch.cuh"

namespace any4 {

cudaError_t LaunchWideBfloat16(const WideLaunch& launch, cudaStream_t stream) {
  // Of two groups a step the instance does for larger ones too.
  if (launch.w.scale_type == Type::kE8m0) return LaunchWideScales<__nv_bfloat16, 2, Type::kE8m0>(launch, stream);
  return LaunchWideGroups<__nv_bfloat16, Type::kBfloat16>(launch, stream);
}

}  // namespace any4
