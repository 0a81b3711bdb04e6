#include "kivi_launch.cuh"

namespace any4 {

cudaError_t AttendKiviFloat16(const KiviStep& step, cudaStream_t stream) { return LaunchKivi<__half>(step, stream); }

}  // namespace any4
