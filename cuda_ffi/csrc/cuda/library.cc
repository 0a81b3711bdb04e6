// What Python asks the library before it uses it; plain C, called through ctypes.
#include <optional>
#include <string_view>
#include <utility>

#include "lut_form.h"
#include "xla/ffi/api/c_api.h"

namespace {

// jax's name of a dtype; of e8m0, which jax arrays hold as bytes, "uint8".
std::optional<any4::Type> TypeNamed(std::string_view name) {
  using any4::Type;
  for (auto [known, type] : {std::pair{std::string_view("bfloat16"), Type::kBfloat16},
                             {std::string_view("float16"), Type::kFloat16},
                             {std::string_view("float32"), Type::kFloat32},
                             {std::string_view("uint8"), Type::kE8m0}}) {
    if (name == known) return type;
  }
  return std::nullopt;
}

// 1 where a kernel has an instance for a weight of these dtypes and sizes; `offsets` is "" where there are none.
int Takes(bool (*has_instance)(const any4::LutForm&), const char* x, const char* scales, const char* offsets,
          int64_t bits, int64_t group_size, int64_t n, int64_t k) {
  const auto type = TypeNamed(x), scale_type = TypeNamed(scales), offset_type = TypeNamed(offsets);
  const bool known = type && scale_type && (offset_type || std::string_view(offsets).empty());
  return known && has_instance({static_cast<int>(bits), group_size, n, k, *type, *scale_type, offset_type});
}

}  // namespace

extern "C" {

// Version of XLA's FFI that the handlers were compiled for, major * 1000 + minor.
int any4_ffi_abi() { return XLA_FFI_API_MAJOR * 1000 + XLA_FFI_API_MINOR; }

int any4_cuda_is_for_turns(const char* x, const char* scales, const char* offsets, int64_t bits, int64_t group_size,
                           int64_t n, int64_t k) {
  return Takes(any4::IsForTurns, x, scales, offsets, bits, group_size, n, k);
}

int any4_cuda_is_for_wide(const char* x, const char* scales, const char* offsets, int64_t bits, int64_t group_size,
                          int64_t n, int64_t k) {
  return Takes(any4::IsForWide, x, scales, offsets, bits, group_size, n, k);
}
}
