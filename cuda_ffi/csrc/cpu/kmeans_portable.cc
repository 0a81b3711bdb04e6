// The solver for every processor.
#include "kmeans_inl.h"

namespace any4 {
const KMeansKernel* PortableKMeans() { return &kKernel; }
}  // namespace any4
