// The solver for x86-64 with AVX-512.
#include "kmeans.h"

#ifdef __AVX512F__
#include "kmeans_inl.h"

namespace any4 {
const KMeansKernel* Avx512KMeans() { return &kKernel; }
}  // namespace any4
#else
namespace any4 {
const KMeansKernel* Avx512KMeans() { return nullptr; }
}  // namespace any4
#endif
