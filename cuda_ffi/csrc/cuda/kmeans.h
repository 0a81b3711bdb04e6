// Optimal weighted k-means in one dimension, of each row of a matrix.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

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

// How many rows are solved at a time, and the bytes of device memory that each of them takes.
struct KMeansPlan {
  int slots;
  int64_t slot_bytes;
};

KMeansPlan PlanKMeans(const KMeansRows& rows);

// `scratch` holds plan.slots * plan.slot_bytes bytes, aligned to 128. Rows with NaN or infinite values give NaN.
// The function neither allocates nor waits.
cudaError_t SolveKMeans(const KMeansRows& rows, const KMeansResult& result, const KMeansPlan& plan, void* scratch,
                        cudaStream_t stream);

}  // namespace any4
