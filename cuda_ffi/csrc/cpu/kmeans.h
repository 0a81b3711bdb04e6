// Weighted one-dimensional k-means of a row: the exact optimum, or Lloyd's iteration from a start.
//
// kmeans_<isa>.cc compiles the solver (kmeans_*_inl.h) for one instruction set; kmeans_handler.cc calls it row by row.
#pragma once

#include <cstdint>

namespace any4 {

// Where Lloyd's iteration starts; with kNone the solver is the exact one.
enum class KMeansStart { kNone, kPlusPlus, kRandom, kSpread, kQuantile };

constexpr int64_t kMaxTrials = 8;

struct KMeansRow {
  const float* values;
  const float* weights;  // null: all 1
  int64_t length;
};

struct KMeansOptions {
  int64_t clusters;
  KMeansStart start;
  // kPlusPlus: fractions of the mass to draw at, [clusters, trials], with at most kMaxTrials trials.
  // kRandom: exponentials, [length of the row or more].
  // kSpread: places between minimum (0) and maximum (1), [clusters]. kQuantile: fractions of the weight, [clusters].
  const float* numbers;
  int64_t trials;
  int64_t max_iter;
  float tol;
};

struct KMeansResult {
  float* centroids;  // [clusters], ascending
  uint8_t* codes;    // [length]
  float* inertia;
};

struct KMeansKernel {
  // The bytes of scratch that a row of this length needs.
  int64_t (*scratch_bytes)(int64_t length, const KMeansOptions& options);
  // `scratch` is aligned to 64 bytes. Rows with NaN or infinite values give NaN.
  void (*solve)(const KMeansRow& row, const KMeansOptions& options, char* scratch, const KMeansResult& result);
};

// Null if the library was built without that instruction set.
const KMeansKernel* PortableKMeans();
const KMeansKernel* Avx2KMeans();
const KMeansKernel* Avx512KMeans();

}  // namespace any4
