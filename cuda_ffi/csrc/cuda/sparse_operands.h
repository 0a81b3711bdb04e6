// Checks what Python passed for a matrix of few entries.
#pragma once

#include <limits>
#include <optional>

#include "handler.h"
#include "sparse_product.h"
#include "xla/ffi/api/ffi.h"

namespace any4 {

// The matrix [n, k] of these operands; nothing if they don't fit together.
inline std::optional<Entries> EntriesOf(const xla::ffi::AnyBuffer& ends, const xla::ffi::AnyBuffer& columns,
                                        const xla::ffi::AnyBuffer& values, int64_t n, int64_t k) {
  namespace ffi = xla::ffi;
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  if (values.dimensions().size() != 2 || !HasShape(ends, {n}) || n > kMost || k > kMost) return std::nullopt;
  const int64_t blocks = values.dimensions()[0], size = values.dimensions()[1];
  const auto index = [](const ffi::AnyBuffer& buffer) {
    return buffer.element_type() == ffi::U16 || buffer.element_type() == ffi::S32;
  };
  const bool floats = values.element_type() == ffi::F32;
  if (!HasShape(columns, {blocks, size}) || blocks < 1 || n % blocks != 0 || size > kMost / 2 || !index(ends) ||
      !index(columns) || !(floats || values.element_type() == ffi::BF16)) {
    return std::nullopt;
  }
  return Entries{ends.untyped_data(),
                 columns.untyped_data(),
                 values.untyped_data(),
                 n,
                 k,
                 static_cast<int>(n / blocks),
                 static_cast<int>(size),
                 ends.element_type() == ffi::S32,
                 columns.element_type() == ffi::S32,
                 floats};
}

}  // namespace any4
