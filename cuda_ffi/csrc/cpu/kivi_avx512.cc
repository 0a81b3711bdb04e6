// Attention over KIVI caches for x86-64 with AVX-512.
#include "kivi.h"

#ifdef __AVX512F__
#include "kivi_inl.h"

namespace any4 {
const KiviKernel* Avx512Kivi() { return &kKernel; }
}  // namespace any4
#else
namespace any4 {
const KiviKernel* Avx512Kivi() { return nullptr; }
}  // namespace any4
#endif
