#include "isa.h"

#include <utility>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace any4 {
namespace {

#if defined(__x86_64__)
// Compilers of 2021 don't know the name "avxvnni": bit 4 of EAX in leaf 7, part 1.
bool HasAvxVnni() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0 && (eax >> 4 & 1) != 0;
}
#endif

bool Has(Isa isa) {
#if defined(__x86_64__)
  // libgcc asks CPUID and XGETBV, so a set whose registers the system doesn't save counts as absent.
  switch (isa) {
    case Isa::kAvx512Vbmi:
      return __builtin_cpu_supports("avx512vbmi") && Has(Isa::kAvx512Vnni);
    case Isa::kAvx512Vnni:
      return __builtin_cpu_supports("avx512vnni") && Has(Isa::kAvx512);
    case Isa::kAvx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
             Has(Isa::kAvx2);
    case Isa::kAvxVnni:
      return HasAvxVnni() && Has(Isa::kAvx2);
    case Isa::kAvx2:
      return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::kDotProd:
      return false;
    case Isa::kPortable:
      return true;
  }
#elif defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long kHasDotProd = 1 << 20;  // HWCAP_ASIMDDP
  if (isa == Isa::kDotProd) return (getauxval(AT_HWCAP) & kHasDotProd) != 0;
#endif
  return isa == Isa::kPortable;
}

constexpr std::pair<std::string_view, Isa> kBestFirst[] = {
    {"avx512vbmi", Isa::kAvx512Vbmi}, {"avx512vnni", Isa::kAvx512Vnni}, {"avx512", Isa::kAvx512},
    {"avxvnni", Isa::kAvxVnni},       {"avx2", Isa::kAvx2},             {"dotprod", Isa::kDotProd},
    {"portable", Isa::kPortable}};

Isa FindBest() {
  for (const auto& [name, isa] : kBestFirst) {
    if (Has(isa)) return isa;
  }
  return Isa::kPortable;
}

}  // namespace

Isa BestIsa() {
  static const Isa best = FindBest();
  return best;
}

std::optional<Isa> IsaNamed(std::string_view name) {
  if (name == "auto") return BestIsa();
  for (const auto& [known, isa] : kBestFirst) {
    if (name == known && Has(isa)) return isa;
  }
  return std::nullopt;
}

}  // namespace any4
