// Turned coded matrices for x86-64 with AVX2.
#include "turned.h"

#ifdef __AVX2__
#include "turned_inl.h"

namespace any4 {
const TurnedKernel* Avx2Turned() { return &kKernel; }
}  // namespace any4
#else
namespace any4 {
const TurnedKernel* Avx2Turned() { return nullptr; }
}  // namespace any4
#endif
