// Attention over KVQuant caches for x86-64 with AVX-512.
#include "kvquant.h"

#ifdef __AVX512F__
#include "kvquant_inl.h"

namespace any4 {
const KVQuantKernel* Avx512KVQuant() { return &kKernel; }
}  // namespace any4
#else
namespace any4 {
const KVQuantKernel* Avx512KVQuant() { return nullptr; }
}  // namespace any4
#endif
