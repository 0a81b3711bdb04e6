// The refit for x86-64 with AVX-512.
#include "refit.h"

#ifdef __AVX512F__
#include "refit_inl.h"

namespace any4 {
const RefitKernel* Avx512Refit() { return &kKernel; }
}  // namespace any4
#else
namespace any4 {
const RefitKernel* Avx512Refit() { return nullptr; }
}  // namespace any4
#endif
