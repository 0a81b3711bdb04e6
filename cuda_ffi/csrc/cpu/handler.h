// What the handlers share: XLA's threads, the shape and type of a matrix, and how they refuse an instruction set.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>
#include <utility>

#include "numbers.h"
#include "threads.h"
#include "xla/ffi/api/ffi.h"

namespace any4 {

// The threads of XLA's own pool, which are idle while a handler runs. The pool has to outlive the executor.
inline Executor ExecutorOf(xla::ffi::ThreadPool& pool) {
  Executor executor;
  executor.threads = std::max<int64_t>(pool.num_threads(), 1);
  executor.spawn = [&pool](std::function<void()> task) { pool.Schedule(std::move(task)); };
  return executor;
}

template <class Buffer>
bool HasShape(const Buffer& buffer, int64_t rows, int64_t columns) {
  const auto shape = buffer.dimensions();
  return shape.size() == 2 && shape[0] == rows && shape[1] == columns;
}

template <class Buffer>
std::optional<Type> TypeOf(const Buffer& buffer) {
  switch (buffer.element_type()) {
    case xla::ffi::F32: return Type::kFloat32;
    case xla::ffi::BF16: return Type::kBfloat16;
    case xla::ffi::U8: return Type::kE8m0;
    default: return std::nullopt;
  }
}

inline bool IsFloat(std::optional<Type> type) { return type && *type != Type::kE8m0; }

inline std::string LacksIsa(std::string_view name) {
  return "got isa=" + std::string(name) + ", which this processor doesn't have; pass \"auto\"";
}

}  // namespace any4
