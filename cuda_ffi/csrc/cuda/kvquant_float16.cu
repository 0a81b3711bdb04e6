#include "kvquant_launch.cuh"

namespace any4 {

cudaError_t AttendKVQuantFloat16(const KVQuantStep& step, cudaStream_t stream) { return LaunchKVQuant<__half>(step, stream); }

}  // namespace any4
