// Optimal weighted k-means in one dimension, of each row of a matrix.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "slots.h"

namespace any4 {

struct KMeansRows {
  const float* values;   // [count, length]
  const float* weights;  // those of row r start at r * weight_stride; null: all 1
  int64_t weight_stride;
  int64_t count;
  int length;
  int clusters;  // 1 to 256
};

struct KMeansResult {
  float* centroids;  // [count, clusters], ascending
  uint8_t* codes;    // [count, length]
  float* inertia;    // [count]
};

Slots KMeansSlots(const KMeansRows& rows);

// `scratch` holds all slots, aligned to 128 bytes. Rows with NaN or infinite values give NaN. The function
// neither allocates nor waits.
cudaError_t SolveKMeans(const KMeansRows& rows, const KMeansResult& result, const Slots& slots, void* scratch,
                        cudaStream_t stream);

}  // namespace any4
