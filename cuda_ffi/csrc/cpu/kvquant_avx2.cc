// Attention over KVQuant caches for x86-64 with AVX2.
#include "kvquant.h"

#ifdef __AVX2__
#include "kvquant_inl.h"

namespace any4 {
const KVQuantKernel* Avx2KVQuant() { return &kKernel; }
}  // namespace any4
#else
namespace any4 {
const KVQuantKernel* Avx2KVQuant() { return nullptr; }
}  // namespace any4
#endif
