// The properties of this thread's current device that launches depend on.
#pragma once

namespace any4 {

int Multiprocessors();

// Whether the device has wgmma, which neither earlier nor later GPUs have.
bool IsHopper();

}  // namespace any4
