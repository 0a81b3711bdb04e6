#include "kivi_launch.cuh"

namespace any4 {

cudaError_t AttendKiviBfloat16(const KiviStep& step, cudaStream_t stream) { return LaunchKivi<__nv_bfloat16>(step, stream); }

}  // namespace any4
