#include "lut_form.h"

#include "lut_tile.cuh"

namespace any4 {

LutForm FormOf(const LutWeight& w, int bits, int64_t group_size, Type type) {
  const auto offset_type = w.offsets != nullptr ? std::optional(w.offset_type) : std::nullopt;
  return {bits, group_size, w.n, w.k, type, w.scale_type, offset_type};
}

bool IsForTurns(const LutForm& form) {
  if (form.k % (2 * kTileInputs) != 0 || form.n % (2 * kTileRows) != 0) return false;
  const bool halves =
      form.scale_type == Type::kBfloat16 && form.offset_type.value_or(Type::kBfloat16) == Type::kBfloat16;
  if (form.type == Type::kFloat16) return halves && form.bits == 4 && form.group_size == kTileInputs;
  const bool exponents =
      form.scale_type == Type::kE8m0 && !form.offset_type && form.bits == 4 && form.group_size == 32;
  return exponents || (halves && form.group_size >= (form.bits == 4 ? 32 : kTileInputs));
}

bool IsForWide(const LutForm& form) {
  // n % 8 == 0 lets rows of y begin at multiples of 16 bytes; those of x and of codes do so, since k % 32 == 0.
  if (form.bits != 4 || form.group_size < 32 || form.n % 8 != 0) return false;
  const bool exponents = form.scale_type == Type::kE8m0 && form.type == Type::kBfloat16;
  const bool halves = form.scale_type == Type::kFloat16 && form.type == Type::kFloat16;
  if (!exponents && !halves && form.scale_type != Type::kBfloat16) return false;
  const Type wanted = exponents ? Type::kBfloat16 : form.scale_type;
  return form.offset_type.value_or(wanted) == wanted;
}

}  // namespace any4
