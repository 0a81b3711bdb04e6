// The sum over the entries of a row, which lanes share.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "sparse_product.h"

namespace any4 {

// Lanes that share a row: a hundredth of a few thousand columns is a few dozen entries.
constexpr int kRowLanes = 8;

__device__ __forceinline__ int EndOf(const Entries& entries, int64_t row) {
  const int end = entries.wide_ends ? __ldg(static_cast<const int32_t*>(entries.ends) + row)
                                    : __ldg(static_cast<const uint16_t*>(entries.ends) + row);
  return min(max(end, 0), entries.size);
}

// sums[r] += this lane's part of row `row` of W times row r of x, for kRows rows of x: input(r, column) is one of it.
// Entries that a damaged file places outside of the matrix count for nothing.
template <int kRows, typename Column, typename Value, typename Input>
__device__ __forceinline__ void AddEntries(const Entries& entries, int64_t row, const Input& input,
                                           float (&sums)[kRows]) {
  const int block = static_cast<int>(row) / entries.rows;
  const int begin = static_cast<int>(row) % entries.rows == 0 ? 0 : EndOf(entries, row - 1);
  const int end = EndOf(entries, row);
  const auto* columns = static_cast<const Column*>(entries.columns) + static_cast<int64_t>(block) * entries.size;
  const auto* values = static_cast<const Value*>(entries.values) + static_cast<int64_t>(block) * entries.size;
#pragma unroll 4
  for (int i = begin + static_cast<int>(threadIdx.x) % kRowLanes; i < end; i += kRowLanes) {
    const auto column = static_cast<uint32_t>(__ldg(columns + i));
    const auto value = static_cast<float>(__ldg(values + i));
    if (column < entries.k) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) sums[r] = fmaf(value, input(r, column), sums[r]);
    }
  }
}

// The sums of all lanes of the row, in each of them.
template <int kRows, typename Input>
__device__ __forceinline__ void SumEntries(const Entries& entries, int64_t row, const Input& input,
                                           float (&sums)[kRows]) {
  if (entries.wide_columns) {
    entries.float_values ? AddEntries<kRows, int32_t, float>(entries, row, input, sums)
                         : AddEntries<kRows, int32_t, __nv_bfloat16>(entries, row, input, sums);
  } else {
    entries.float_values ? AddEntries<kRows, uint16_t, float>(entries, row, input, sums)
                         : AddEntries<kRows, uint16_t, __nv_bfloat16>(entries, row, input, sums);
  }
#pragma unroll
  for (int lanes = 1; lanes < kRowLanes; lanes *= 2) {
#pragma unroll
    for (float& sum : sums) sum += __shfl_xor_sync(~0u, sum, lanes);
  }
}

}  // namespace any4
