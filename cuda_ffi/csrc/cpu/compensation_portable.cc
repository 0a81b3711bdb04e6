// Error compensation for every processor.
#include "compensation_inl.h"

namespace any4 {
const CompensationKernel* PortableCompensation() { return &kKernel; }
}  // namespace any4
