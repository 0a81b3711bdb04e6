// The solver for x86-64 with AVX2.
#include "kmeans.h"

#ifdef __AVX2__
#include "kmeans_inl.h"

namespace any4 {
const KMeansKernel* Avx2KMeans() { return &kKernel; }
}  // namespace any4
#else
namespace any4 {
const KMeansKernel* Avx2KMeans() { return nullptr; }
}  // namespace any4
#endif
