// Attention over dense caches for x86-64 with AVX2.
#include "dense.h"

#ifdef __AVX2__
#include "dense_inl.h"

namespace any4 {
const DenseKernel* Avx2Dense() { return &kKernel; }
}  // namespace any4
#else
namespace any4 {
const DenseKernel* Avx2Dense() { return nullptr; }
}  // namespace any4
#endif
