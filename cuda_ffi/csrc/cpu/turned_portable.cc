// Turned coded matrices for every processor.
#include "turned_inl.h"

namespace any4 {
const TurnedKernel* PortableTurned() { return &kKernel; }
}  // namespace any4
