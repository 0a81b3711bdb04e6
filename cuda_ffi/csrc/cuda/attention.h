// Attention of one new token a row, with its key and value written to the cache.
//
// Each of `groups` key and value heads is shared by heads / groups query heads. A row's query sees the slots from
// start[row] to its own, positions[row] + start[row], or the last `window` of them. The new key and value go to its own
// slot, the last one of the cache if it is beyond; that is the same slot in all rows.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace any4 {

// The most blocks that share the slots of one key and value head.
constexpr int kMostParts = 16;
constexpr int kMostSize = 256;

// T is the element type of all arrays that are `void`.
struct AttentionStep {
  const void* queries;     // [rows, heads, size]
  const void* new_keys;    // [rows, groups, size]
  const void* new_values;  // [rows, groups, size]
  void* keys;              // [rows * groups, size, slots]
  void* values;            // [rows * groups, slots, size]
  int* length;             // becomes the number of slots in use, the new one's included; it isn't read
  const int* positions;    // [rows]
  const int* start;        // [rows]
  const float* cos;        // [rows, size / 2]; null: queries and new keys aren't rotated
  const float* sin;        // like cos
  void* mixed;             // [rows, heads, size], the result
  float* partials;         // [rows, heads, kMostParts, size + 2], memory to work in
  int rows, heads, groups;
  int size;   // a multiple of 16, at most kMostSize
  int slots;  // a multiple of 8
  float scale;
  float softcap;  // 0: none
  int window;     // 0: none
};

// One launch; two on GPUs before Hopper where several blocks share slots. The functions neither allocate nor wait.
cudaError_t AttendBfloat16(const AttentionStep& step, cudaStream_t stream);
cudaError_t AttendFloat16(const AttentionStep& step, cudaStream_t stream);

}  // namespace any4
