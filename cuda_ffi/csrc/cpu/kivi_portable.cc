// Attention over KIVI caches for every processor.
#include "kivi_inl.h"

namespace any4 {
const KiviKernel* PortableKivi() { return &kKernel; }
}  // namespace any4
