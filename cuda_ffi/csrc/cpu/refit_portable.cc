// The refit for every processor.
#include "refit_inl.h"

namespace any4 {
const RefitKernel* PortableRefit() { return &kKernel; }
}  // namespace any4
