// Attention over dense caches for x86-64 with AVX-512.
#include "dense.h"

#ifdef __AVX512F__
#include "dense_inl.h"

namespace any4 {
const DenseKernel* Avx512Dense() { return &kKernel; }
}  // namespace any4
#else
namespace any4 {
const DenseKernel* Avx512Dense() { return nullptr; }
}  // namespace any4
#endif
