// LutWide for x in float16.
#include "lut_wide_launch.cuh"

namespace any4 {

cudaError_t LaunchWideFloat16(const WideLaunch& launch, cudaStream_t stream) {
  if (launch.w.scale_type == Type::kFloat16) return LaunchWideGroups<__half, Type::kFloat16>(launch, stream);
  return LaunchWideGroups<__half, Type::kBfloat16>(launch, stream);
}

}  // namespace any4
