// Which instruction set's code runs. The process chooses once; tests name another set by a call's attribute `isa`.
#pragma once

#include <optional>
#include <string_view>

namespace any4 {

// Those of x86 from kAvx2 on are in an order such that whoever has a set has all before it, but for kAvxVnni, which some
// with AVX-512 lack. kDotProd is ARM's.
enum class Isa { kPortable, kDotProd, kAvx2, kAvxVnni, kAvx512, kAvx512Vnni, kAvx512Vbmi };

// The best that this processor has.
Isa BestIsa();

// "auto" or a set's name ("portable", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512vbmi", "dotprod") as an Isa;
// empty if the name is unknown or this processor lacks the set.
std::optional<Isa> IsaNamed(std::string_view name);

// The kernel for an instruction set: the best of those within it, or the portable one if the library was built without
// them, so that they are null.
template <class Kernel>
const Kernel& KernelFor(Isa isa, const Kernel* portable, const Kernel* avx2, const Kernel* avx512) {
  const Kernel* const kernel = isa >= Isa::kAvx512 ? avx512 : isa >= Isa::kAvx2 ? avx2 : portable;
  return kernel != nullptr ? *kernel : *portable;
}

}  // namespace any4
