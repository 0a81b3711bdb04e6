// A thread works on one row, whose columns follow one another; rows are independent. Columns are taken in panels of
// eight: what the errors before a panel add to its columns are eight sums at a time, and within a panel everything is
// in registers.
#include <cuda_pipeline.h>

#include "compensation.h"

namespace any4 {
namespace {

// One warp, so that few rows are spread over many multiprocessors.
constexpr int kThreads = 32;
constexpr int kPanel = 8;

// Shared memory: two panels of the corner [columns, kPanel], then a column for each thread of: its errors [columns],
// its levels, and if they are no ramp the thresholds between them.
int SharedBytes(const CompensationBlock& block) {
  const int tables = block.uniform ? 1 : 2;
  const int floats = 2 * kPanel * block.columns + kThreads * (block.columns + tables * block.levels);
  return floats * static_cast<int>(sizeof(float));
}

// Begins to copy the panel of columns from `first` on, down to its own rows. Columns past the last one are zero.
__device__ void Fetch(const CompensationBlock& block, int first, float* panel) {
  const int height = min(first + kPanel, block.columns);
  for (int at = threadIdx.x; at < height * kPanel; at += kThreads) {
    const int column = first + at % kPanel;
    const bool inside = column < block.columns;
    const float* const from = block.corner + at / kPanel * block.columns + (inside ? column : 0);
    __pipeline_memcpy_async(panel + at, from, sizeof(float), inside ? 0 : sizeof(float));
  }
  __pipeline_commit();
}

// A row's table, whose entries lie kThreads apart.
template <bool kUniform>
class Table {
 public:
  // `levels` begins this thread's columns of shared memory.
  __device__ Table(const float* values, int count, float* levels)
      : count_(count), levels_(levels), thresholds_(levels + count * kThreads) {
    for (int i = 0; i < count; ++i) levels[i * kThreads] = values[i];
    first_ = At(0);
    step_ = At(1) - first_;
    // A value on a middle above zero is beyond it, which is to exceed the number before it.
    for (int i = 0; i + 1 < (kUniform ? 0 : count); ++i) {
      const float middle = (At(i) + At(i + 1)) / 2;
      thresholds_[i * kThreads] = middle > 0 ? __int_as_float(__float_as_int(middle) - 1) : middle;
    }
  }

  __device__ float At(int code) const { return levels_[code * kThreads]; }

  // The code of the nearest entry; 0 for NaN.
  __device__ int Nearest(float value) const {
    if (kUniform) {
      const float steps = rintf(__fdiv_rn(value - first_, step_));
      return static_cast<int>(fminf(fmaxf(steps, 0.0f), static_cast<float>(count_ - 1)));
    }
    int code = 0;
    for (int half = count_ / 2; half > 0; half /= 2) {
      if (value > thresholds_[(code + half - 1) * kThreads]) code += half;
    }
    return code;
  }

 private:
  int count_;
  float* levels_;
  float* thresholds_;
  float first_, step_;
};

template <bool kUniform>
__global__ void __launch_bounds__(kThreads) CompensateRows(const CompensationBlock block,
                                                           const CompensationResult result) {
  extern __shared__ float4 shared[];
  const int columns = block.columns;
  float* const panels = reinterpret_cast<float*>(shared);
  float* const errors = panels + 2 * kPanel * columns + threadIdx.x;
  const int64_t own_row = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  // Threads past the last row repeat it and store nothing: all are needed to copy panels.
  const bool stores = own_row < block.rows;
  const int64_t row = stores ? own_row : block.rows - 1;

  Fetch(block, 0, panels);
  const Table<kUniform> table(block.table + row * block.levels, block.levels, errors + columns * kThreads);
  for (int first = 0; first < columns; first += kPanel) {
    const float* const panel = panels + first / kPanel % 2 * kPanel * columns;
    __pipeline_wait_prior(0);
    // The panel has arrived for all threads, and all have finished with the other one.
    __syncthreads();
    if (first + kPanel < columns) Fetch(block, first + kPanel, panels + (first / kPanel + 1) % 2 * kPanel * columns);

    float own[kPanel], wanted[kPanel], scales[kPanel], offsets[kPanel], sums[kPanel];
#pragma unroll
    for (int i = 0; i < kPanel; ++i) {
      const int64_t at = min(first + i, columns - 1) * block.rows + row;
      own[i] = __ldg(block.own + at);
      wanted[i] = __ldg(block.wanted + at);
      scales[i] = __ldg(block.scales + at);
      offsets[i] = block.offsets == nullptr ? 0 : __ldg(block.offsets + at);
      sums[i] = 0;
    }
    const auto add = [&](int j, float error) {
      const float4* const factors = reinterpret_cast<const float4*>(panel + j * kPanel);
      const float4 low = factors[0], high = factors[1];
      const float by[kPanel] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int i = 0; i < kPanel; ++i) sums[i] = fmaf(by[i], error, sums[i]);
    };
#pragma unroll 4
    for (int j = 0; j < first; ++j) add(j, errors[j * kThreads]);
#pragma unroll
    for (int i = 0; i < kPanel; ++i) {
      const int column = first + i;
      if (column >= columns) break;
      const float value = wanted[i] + sums[i];
      const float u = scales[i] == 0 ? 0 : __fdiv_rn(value - offsets[i], scales[i]);
      const int code = table.Nearest(u);
      const float error = own[i] - fmaf(table.At(code), scales[i], offsets[i]);
      errors[column * kThreads] = error;
      if (stores) {
        result.codes[column * block.rows + row] = static_cast<uint8_t>(code);
        result.errors[column * block.rows + row] = error;
      }
      add(column, error);
    }
  }
}

}  // namespace

cudaError_t Compensate(const CompensationBlock& block, const CompensationResult& result, cudaStream_t stream) {
  const auto kernel = block.uniform ? CompensateRows<true> : CompensateRows<false>;
  const int bytes = SharedBytes(block);
  // More than this a kernel must ask for. The largest block and table need 88 KB, which all GPUs since Ampere have.
  constexpr int kFree = 48 << 10;
  if (bytes > kFree) {
    const cudaError_t error = cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                                                   cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
  }
  const auto blocks = static_cast<unsigned>((block.rows + kThreads - 1) / kThreads);
  kernel<<<blocks, kThreads, bytes, stream>>>(block, result);
  return cudaGetLastError();
}

}  // namespace any4
