// Attention over KIVI caches for x86-64 with AVX2.
#include "kivi.h"

#ifdef __AVX2__
#include "kivi_inl.h"

namespace any4 {
const KiviKernel* Avx2Kivi() { return &kKernel; }
}  // namespace any4
#else
namespace any4 {
const KiviKernel* Avx2Kivi() { return nullptr; }
}  // namespace any4
#endif
