// How threads share the products of one x with several weights: the rows of all weights as if they were one matrix.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "rows.h"
#include "weight.h"

namespace any4 {

inline int64_t ItemBytes(Type type) { return type == Type::kFloat32 ? 4 : 2; }

// The rows of all weights.
inline int64_t RowsOf(const Product* products, int64_t count) {
  int64_t n = 0;
  for (const Product* product = products; product < products + count; ++product) n += product->weight.n;
  return n;
}

// The first of each `planes` consecutive weights, of which there are `count`; it has the y of their sum.
inline std::vector<Product> FirstPlanes(const Product* products, int64_t count, int64_t planes) {
  std::vector<Product> first;
  for (int64_t i = 0; i < count; ++i) first.push_back(products[i * planes]);
  return first;
}

// Sizes of the work.
struct Passes {
  int64_t input_rows;     // of x, the most in one pass over the weights
  int64_t unit;           // rows of a weight that a kernel takes at a time
  int64_t task_rows;      // of a weight, the most in a task
  int64_t scratch_bytes;  // of a task
};

// For each pass over the weights, with at most passes.input_rows rows of x, [first, first + rows):
//   arrange(first, row) once for each `row` below `rows`, on any thread; then
//   multiply(product, begin, end, rows, output, scratch) for ranges that together are all rows of all weights.
template <class Arrange, class Multiply>
void ForProducts(const Product* products, int64_t count, int64_t m, Type type, const Passes& passes,
                 const Executor& executor, const Arrange& arrange, const Multiply& multiply) {
  // Several tasks a thread, so that others take over from a thread that is held up.
  const int64_t share = RowsOf(products, count) / (executor.threads * 4) / passes.unit * passes.unit;
  const int64_t task_rows = std::clamp(share, passes.unit, passes.task_rows);
  struct Task {
    const Product* product;
    int64_t begin;
  };
  std::vector<Task> tasks;
  for (const Product* product = products; product < products + count; ++product) {
    for (int64_t begin = 0; begin < product->weight.n; begin += task_rows) tasks.push_back({product, begin});
  }
  for (int64_t first = 0; first < m; first += passes.input_rows) {
    const int64_t rows = std::min(passes.input_rows, m - first);
    // Some thousand numbers take a microsecond, about as long as other threads take to hear of it.
    if (rows * products->weight.k >= 8192) {
      ParallelFor(executor, rows, [&](int64_t row) { arrange(first, row); });
    } else {
      for (int64_t row = 0; row < rows; ++row) arrange(first, row);
    }
    ForTasks(executor, static_cast<int64_t>(tasks.size()), passes.scratch_bytes, [&](int64_t index, char* scratch) {
      const auto [product, begin] = tasks[index];
      const int64_t n = product->weight.n;
      const Output output{static_cast<char*>(product->y) + first * n * ItemBytes(type), n, type};
      multiply(*product, begin, std::min(begin + task_rows, n), rows, output, scratch);
    });
  }
}

}  // namespace any4
