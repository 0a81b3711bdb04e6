#include "isa.h"

#include <utility>

namespace any4 {
namespace {

bool Has(Isa isa) {
#if defined(__x86_64__)
  // libgcc asks CPUID and XGETBV, so a set whose registers the system doesn't save counts as absent.
  switch (isa) {
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             Has(Isa::kAvx2);
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::kPortable:
      return true;
  }
#endif
  return isa == Isa::kPortable;
}

}  // namespace

Isa BestIsa() {
  static const Isa best = Has(Isa::kAvx512) ? Isa::kAvx512 : Has(Isa::kAvx2) ? Isa::kAvx2 : Isa::kPortable;
  return best;
}

std::optional<Isa> IsaNamed(std::string_view name) {
  if (name == "auto") return BestIsa();
  for (auto [known, isa] : {std::pair{std::string_view("portable"), Isa::kPortable},
                            {std::string_view("avx2"), Isa::kAvx2},
                            {std::string_view("avx512"), Isa::kAvx512}}) {
    if (name == known && Has(isa)) return isa;
  }
  return std::nullopt;
}

}  // namespace any4
