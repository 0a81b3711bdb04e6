// A block of threads solves one row after another, in its own slot of device memory.
#include <math_constants.h>

#include "kmeans_exact.cuh"
#include "kmeans_sort.cuh"

namespace any4 {
namespace {

constexpr int kMostClusters = 256;

struct Shared {
  Slot slot;
  union {
    uint64_t chunk[kChunk];
    Candidate tiles[kWarps][kLanes];
  };
  double sums[kWarps];
  int maxima[kWarps];
  int next, count;
  int firsts[kMostClusters];
  float means[kMostClusters], weights[kMostClusters];
  float centroids[kMostClusters];
};

__device__ double WarpSum(double value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAll, value, step);
  return value;
}

// Finds the centroids, in units of the row and ascending. Where fewer than k clusters have weight, the first is
// repeated.
__device__ void Centroids(const Slot& slot, int k, float unit, Shared& shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (warp == 0) {
    const int count = Backtrack(slot, shared.firsts);
    if (lane == 0) shared.count = count;
  }
  __syncthreads();
  const int count = shared.count;
  for (int c = warp; c < count; c += kWarps) {
    const int first = shared.firsts[count - 1 - c], stop = c + 1 < count ? shared.firsts[count - 2 - c] : slot.length;
    const double origin = slot.x[first];
    double weight = 0, moved = 0;
    for (int i = first + lane; i < stop; i += 32) {
      weight += slot.w[i];
      moved += slot.w[i] * (slot.x[i] - origin);
    }
    weight = WarpSum(weight), moved = WarpSum(moved);
    if (lane == 0) {
      shared.weights[c] = static_cast<float>(weight);
      shared.means[c] = static_cast<float>(origin + moved / weight);
    }
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    int place = k;
    for (int c = count - 1; c >= 0; --c) {
      if (shared.weights[c] > 0) shared.centroids[--place] = shared.means[c] * unit;
    }
    for (int c = 0; c < place; ++c) shared.centroids[c] = shared.centroids[place];
  }
  __syncthreads();
}

// Finds the nearest centroid of each value, the lower of two as near, and the sum of weight * distance^2.
__device__ void Assign(const float* values, const float* weights, int length, int k, uint8_t* codes, float* inertia,
                       Shared& shared) {
  double sum = 0;
  for (int i = threadIdx.x; i < length; i += kThreads) {
    const float x = values[i];
    float least = CUDART_INF_F;
    int nearest = 0;
    for (int c = 0; c < k; ++c) {
      const float distance = fabsf(x - shared.centroids[c]);
      if (distance < least) {
        least = distance;
        nearest = c;
      }
    }
    codes[i] = static_cast<uint8_t>(nearest);
    const double weight = weights != nullptr ? weights[i] : 1.0f;
    sum += weight * (static_cast<double>(least) * least);
  }
  sum = WarpSum(sum);
  if (threadIdx.x % 32 == 0) shared.sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    double total = 0;
    for (int warp = 0; warp < kWarps; ++warp) total += shared.sums[warp];
    *inertia = static_cast<float>(total);
  }
}

__global__ void __launch_bounds__(kThreads) Solve(const KMeansRows rows, const KMeansResult result, char* scratch,
                                                  const int64_t slot_bytes) {
  __shared__ Shared shared;
  // In shared memory, since its pointers would take half of a thread's registers.
  const Slot& slot = shared.slot;
  if (threadIdx.x == 0) shared.slot.Place(scratch + blockIdx.x * slot_bytes, rows.length, rows.clusters);
  __syncthreads();
  const int k = rows.clusters;
  for (int64_t r = blockIdx.x; r < rows.count; r += gridDim.x) {
    const float* const values = rows.values + r * rows.length;
    const float* weights = rows.weights == nullptr ? nullptr : rows.weights + r * rows.weight_stride;
    uint8_t* const codes = result.codes + r * rows.length;
    const Scaling scaling = ScalingOf(values, weights, rows.length, shared.maxima);
    if (!scaling.finite) {
      for (int i = threadIdx.x; i < rows.length; i += kThreads) codes[i] = 0;
      for (int c = threadIdx.x; c < k; c += kThreads) result.centroids[r * k + c] = CUDART_NAN_F;
      if (threadIdx.x == 0) result.inertia[r] = CUDART_NAN_F;
      continue;
    }
    if (!scaling.weighted) weights = nullptr;
    SortRow(values, weights, scaling, slot, shared.chunk);
    BuildTable(slot);
    SolveLayers(slot, shared.tiles[threadIdx.x / 32], &shared.next);
    Centroids(slot, k, scaling.unit, shared);
    for (int c = threadIdx.x; c < k; c += kThreads) result.centroids[r * k + c] = shared.centroids[c];
    Assign(values, weights, rows.length, k, codes, result.inertia + r, shared);
  }
}

}  // namespace

Slots KMeansSlots(const KMeansRows& rows) {
  Slot slot;
  const int64_t bytes = slot.Place(nullptr, rows.length, rows.clusters);
  return SlotsFor(reinterpret_cast<const void*>(Solve), kThreads, rows.count, bytes);
}

cudaError_t SolveKMeans(const KMeansRows& rows, const KMeansResult& result, const Slots& slots, void* scratch,
                        cudaStream_t stream) {
  Solve<<<slots.count, kThreads, 0, stream>>>(rows, result, static_cast<char*>(scratch), slots.bytes);
  return cudaGetLastError();
}

}  // namespace any4
