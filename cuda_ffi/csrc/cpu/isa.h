// Which instruction set's code runs. The process chooses once; tests name another set by a call's attribute `isa`.
#pragma once

#include <optional>
#include <string_view>

namespace any4 {

enum class Isa { kPortable, kAvx2, kAvx512 };

// The best that this processor has.
Isa BestIsa();

// "auto", "portable", "avx2" or "avx512" as an Isa; empty if the name is unknown or this processor lacks the set.
std::optional<Isa> IsaNamed(std::string_view name);

// The kernel of an instruction set, or the portable one if the library was built without it, so that it is null.
template <class Kernel>
const Kernel& KernelFor(Isa isa, const Kernel* portable, const Kernel* avx2, const Kernel* avx512) {
  const Kernel* const kernel = isa == Isa::kAvx512 ? avx512 : isa == Isa::kAvx2 ? avx2 : portable;
  return kernel != nullptr ? *kernel : *portable;
}

}  // namespace any4
