// Error compensation for x86-64 with AVX2.
#include "compensation.h"

#ifdef __AVX2__
#include "compensation_inl.h"

namespace any4 {
const CompensationKernel* Avx2Compensation() { return &kKernel; }
}  // namespace any4
#else
namespace any4 {
const CompensationKernel* Avx2Compensation() { return nullptr; }
}  // namespace any4
#endif
