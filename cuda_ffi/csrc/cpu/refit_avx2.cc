// The refit for x86-64 with AVX2.
#include "refit.h"

#ifdef __AVX2__
#include "refit_inl.h"

namespace any4 {
const RefitKernel* Avx2Refit() { return &kKernel; }
}  // namespace any4
#else
namespace any4 {
const RefitKernel* Avx2Refit() { return nullptr; }
}  // namespace any4
#endif
