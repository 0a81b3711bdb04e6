// Attention over dense caches for every processor.
#include "dense_inl.h"

namespace any4 {
const DenseKernel* PortableDense() { return &kKernel; }
}  // namespace any4
