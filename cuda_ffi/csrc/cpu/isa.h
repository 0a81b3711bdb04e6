// Which instruction set's code runs. The choice is made once for the process; tests name another by the attribute
// `isa` of a call.
#pragma once

#include <optional>
#include <string_view>

namespace any4 {

enum class Isa { kPortable, kAvx2, kAvx512 };

// The best that both this processor and the build have.
Isa BestIsa();

// "auto", "portable", "avx2" or "avx512" as an Isa; empty where the name is unknown or this processor lacks it.
std::optional<Isa> IsaNamed(std::string_view name);

// The kernel of an instruction set: the portable one where the library was built without that set's, which is null.
template <class Kernel>
const Kernel& KernelFor(Isa isa, const Kernel* portable, const Kernel* avx2, const Kernel* avx512) {
  const Kernel* const kernel = isa == Isa::kAvx512 ? avx512 : isa == Isa::kAvx2 ? avx2 : portable;
  return kernel != nullptr ? *kernel : *portable;
}

}  // namespace any4
