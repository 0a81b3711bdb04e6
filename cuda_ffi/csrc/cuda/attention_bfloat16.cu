#include "attention_launch.cuh"

namespace any4 {

cudaError_t AttendBfloat16(const AttentionStep& step, cudaStream_t stream) {
  return LaunchAttention<__nv_bfloat16>(step, stream);
}

}  // namespace any4
