// Rows shared out among threads, and the memory that each task works in.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <functional>
#include <memory>
#include <new>

#include "threads.h"

namespace any4 {

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Uninitialized values that begin with a cache line.
template <class T>
std::unique_ptr<T[], Free> Allocate(int64_t count) {
  // Whole cache lines, which aligned_alloc asks for, and at least one.
  constexpr size_t kLine = 64;
  const size_t bytes = std::max<size_t>((static_cast<size_t>(count) * sizeof(T) + kLine - 1) / kLine * kLine, kLine);
  auto* const memory = static_cast<T*>(std::aligned_alloc(kLine, bytes));
  if (memory == nullptr) throw std::bad_alloc();
  return std::unique_ptr<T[], Free>(memory);
}

// ParallelFor of tasks that each work in `scratch_bytes` of memory of their own: task(i, scratch), aligned to 64 bytes.
inline void ForTasks(const Executor& executor, int64_t count, int64_t scratch_bytes,
                     const std::function<void(int64_t, char*)>& task) {
  ParallelFor(executor, count, [&](int64_t i) {
    if (scratch_bytes == 0) return task(i, nullptr);
    task(i, Allocate<char>(scratch_bytes).get());
  });
}

// Calls task(begin, end, scratch) for ranges that together are rows [0, count), as ForTasks does.
inline void ForRows(const Executor& executor, int64_t count, int64_t scratch_bytes,
                    const std::function<void(int64_t, int64_t, char*)>& task) {
  // A few tasks a thread: scratch is rarely allocated, and no thread waits long for the last one.
  const int64_t tasks = std::min(count, 4 * executor.threads);
  ForTasks(executor, tasks, scratch_bytes, [&](int64_t i, char* scratch) {
    task(count * i / tasks, count * (i + 1) / tasks, scratch);
  });
}

}  // namespace any4
