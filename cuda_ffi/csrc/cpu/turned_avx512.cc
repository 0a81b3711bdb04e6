// Turned coded matrices for x86-64 with AVX-512.
#include "turned.h"

#ifdef __AVX512F__
#include "turned_inl.h"

namespace any4 {
const TurnedKernel* Avx512Turned() { return &kKernel; }
}  // namespace any4
#else
namespace any4 {
const TurnedKernel* Avx512Turned() { return nullptr; }
}  // namespace any4
#endif
