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

}  // namespace any4
