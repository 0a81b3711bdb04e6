#include "kvquant_launch.cuh"

namespace any4 {

cudaError_t AttendKVQuantBfloat16(const KVQuantStep& step, cudaStream_t stream) { return LaunchKVQuant<__nv_bfloat16>(step, stream); }

}  // namespace any4
