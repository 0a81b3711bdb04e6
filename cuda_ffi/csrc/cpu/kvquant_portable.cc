// Attention over KVQuant caches for every processor.
#include "kvquant_inl.h"

namespace any4 {
const KVQuantKernel* PortableKVQuant() { return &kKernel; }
}  // namespace any4
