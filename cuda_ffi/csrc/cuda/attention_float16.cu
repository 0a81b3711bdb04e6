#include "attention_launch.cuh"

namespace any4 {

cudaError_t AttendFloat16(const AttentionStep& step, cudaStream_t stream) {
  return LaunchAttention<__half>(step, stream);
}

}  // namespace any4
