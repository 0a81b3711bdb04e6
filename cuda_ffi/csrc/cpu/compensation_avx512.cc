// Error compensation for x86-64 with AVX-512.
#include "compensation.h"

#ifdef __AVX512F__
#include "compensation_inl.h"

namespace any4 {
const CompensationKernel* Avx512Compensation() { return &kKernel; }
}  // namespace any4
#else
namespace any4 {
const CompensationKernel* Avx512Compensation() { return nullptr; }
}  // namespace any4
#endif
