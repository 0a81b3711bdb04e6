// Decode attention shared among threads: parts of each pair's tokens, and then the heads that they are parts of.
#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "attention.h"
#include "rows.h"

namespace any4 {

// Tokens of a task. It doesn't depend on the number of threads, so results don't.
constexpr int64_t kTaskTokens = 4 * kAttentionChunk;

template <class Buffer>
bool Has(const Buffer& buffer, std::initializer_list<int64_t> shape) {
  const auto dimensions = buffer.dimensions();
  return std::equal(dimensions.begin(), dimensions.end(), shape.begin(), shape.end());
}

// The mixtures of all heads of a step by its kernel.
template <class Step, class Kernel>
void AttendInParts(const Executor& executor, const Step& step, const Kernel& kernel, const Output& out) {
  int64_t last = -1;
  for (int64_t row = 0; row < step.rows; ++row) last = std::max(last, step.own(row));
  const int64_t pairs = step.rows * step.groups, shared = step.shared(), pitch = kAttentionSums + step.size;
  const int64_t parts = last < 0 ? 0 : last / kTaskTokens + 1;
  const auto found = Allocate<float>(pairs * shared * parts * pitch);
  const auto part = [&](int64_t pair, int64_t i) { return found.get() + (pair * parts + i) * shared * pitch; };
  ForTasks(executor, pairs * parts, kernel.scratch_bytes(step), [&](int64_t i, char* scratch) {
    const int64_t pair = i / parts, begin = i % parts * kTaskTokens;
    kernel.attend(step, pair, begin, begin + kTaskTokens, part(pair, i % parts), scratch);
  });
  for (int64_t head = 0; head < step.rows * step.heads; ++head) {
    kernel.combine(part(head / shared, 0) + head % shared * pitch, parts, shared * pitch, step.size, head, out);
  }
}

}  // namespace any4
