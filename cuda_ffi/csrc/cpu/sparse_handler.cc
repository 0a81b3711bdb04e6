// XLA's entry point to products with few entries, in the layout of layout.py.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <string>

#include "handler.h"
#include "rows.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using any4::HasShape;

ffi::Error Invalid(const std::string& message) {
  return ffi::Error::InvalidArgument("any4_cpu_sparse_product: " + message);
}

float ToFloat(uint16_t bf16) {
  const uint32_t bits = uint32_t{bf16} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
float ToFloat(float value) { return value; }

// The entries of N rows in blocks of `rows` each, of which each has room for `size` entries.
template <class Column, class Value>
struct Entries {
  const int32_t* ends;
  const Column* columns;
  const Value* values;
  int64_t rows, size, k;

  // Entries that a damaged file places outside of the matrix count for nothing.
  float Sum(const float* x, int64_t n) const {
    const int64_t first = n / rows * size;
    const int64_t begin = n % rows == 0 ? 0 : std::clamp<int64_t>(ends[n - 1], 0, size);
    const int64_t end = std::clamp<int64_t>(ends[n], 0, size);
    float sum = 0;
    for (int64_t i = first + begin; i < first + end; ++i) {
      const auto column = static_cast<int64_t>(columns[i]);
      if (column >= 0 && column < k) sum += ToFloat(values[i]) * x[column];
    }
    return sum;
  }
};

ffi::Error Multiply(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S32> ends, ffi::AnyBuffer columns,
                    ffi::AnyBuffer values, ffi::Result<ffi::Buffer<ffi::F32>> y) {
  if (x.dimensions().size() != 2 || ends.dimensions().size() != 1 || values.dimensions().size() != 2) {
    return Invalid("x and values need two axes, ends one");
  }
  const int64_t m = x.dimensions()[0], k = x.dimensions()[1], n = ends.dimensions()[0];
  const int64_t blocks = values.dimensions()[0], size = values.dimensions()[1];
  if (blocks < 1 || n % blocks != 0 || !HasShape(columns, blocks, size) || !HasShape(*y, m, n)) {
    return Invalid("the shapes of its operands don't fit together");
  }
  const auto run = [&](const auto* of_columns, const auto* of_values) {
    const Entries<std::decay_t<decltype(*of_columns)>, std::decay_t<decltype(*of_values)>> entries{
        ends.typed_data(), of_columns, of_values, n / blocks, size, k};
    any4::ForRows(any4::ExecutorOf(pool), n, 0, [&](int64_t begin, int64_t end, char*) {
      for (int64_t row = 0; row < m; ++row) {
        for (int64_t i = begin; i < end; ++i) y->typed_data()[row * n + i] = entries.Sum(x.typed_data() + row * k, i);
      }
    });
    return ffi::Error::Success();
  };
  const auto of_values = [&](const auto* of_columns) {
    if (values.element_type() == ffi::F32) return run(of_columns, static_cast<const float*>(values.untyped_data()));
    if (values.element_type() == ffi::BF16) return run(of_columns, static_cast<const uint16_t*>(values.untyped_data()));
    return Invalid("values are float32 or bfloat16");
  };
  if (columns.element_type() == ffi::U16) return of_values(static_cast<const uint16_t*>(columns.untyped_data()));
  if (columns.element_type() == ffi::S32) return of_values(static_cast<const int32_t*>(columns.untyped_data()));
  return Invalid("columns are uint16 or int32");
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(any4_cpu_sparse_product, Multiply,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S32>>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
