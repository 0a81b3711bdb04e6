// What launches depend on of the device that they are for: the current one of this thread.
#pragma once

namespace any4 {

int Multiprocessors();

// Whether it has wgmma, which neither earlier GPUs have nor later ones.
bool IsHopper();

}  // namespace any4
