#include "lut_binary.h"

#include <algorithm>
#include <vector>

#include "lut_binary_kernel.h"
#include "products.h"

namespace any4 {
namespace {

#include "numbers_inl.h"

}  // namespace

void BinaryProducts(const Product* products, int64_t count, int64_t planes, const void* x, int64_t m, Type type, Isa isa,
                    const Executor& executor) {
  const std::vector<Product> sums = FirstPlanes(products, count, planes);
  if (m == 0 || RowsOf(sums.data(), count) == 0) return;
  const Weight& shape = products[0].weight;
  const BinaryKernel& kernel =
      KernelFor(isa, PortableBinaryKernel(), Avx2BinaryKernel(), Avx512BinaryKernel());

  BinaryInput input{};
  input.groups = shape.groups();
  input.words = (shape.k + kWord - 1) / kWord;
  input.group_words = input.groups == 1 ? input.words : shape.group_size / kWord;
  input.table_stride = input.words * kernel.word_floats;
  const int64_t pass_rows = std::min(m, kBinaryInputRows), row_floats = input.words * kWord;
  const auto tables = Allocate<float>(pass_rows * input.table_stride + kBeyond);
  const auto group_sums = Allocate<float>(pass_rows * input.groups);
  const auto values = Allocate<float>(pass_rows * row_floats);
  input.tables = tables.get();
  input.sums = group_sums.get();

  const auto arrange = [&](int64_t first, int64_t row) {
    float* const here = values.get() + row * row_floats;
    Widen(x, type, (first + row) * shape.k, shape.k, here);
    std::fill(here + shape.k, here + row_floats, 0.0f);
    kernel.tables(here, input.words, tables.get() + row * input.table_stride);
    for (int64_t g = 0; g < input.groups; ++g) {
      const int64_t end = std::min((g + 1) * shape.group_size, shape.k);
      float sum = 0;
      for (int64_t k = g * shape.group_size; k < end; ++k) sum += here[k];
      group_sums.get()[row * input.groups + g] = sum;
    }
  };
  const auto multiply = [&](const Product& sum, int64_t begin, int64_t end, int64_t rows, const Output& output,
                            char* scratch) {
    BinaryInput of_pass = input;
    of_pass.rows = rows;
    kernel.multiply(products + (&sum - sums.data()) * planes, planes, of_pass, begin, end, output, scratch);
  };
  const int64_t scratch_bytes = BinaryScratchBytes(kernel, input);
  ForProducts(sums.data(), count, m, type, {kBinaryInputRows, kernel.rows, kBinaryTaskRows, scratch_bytes}, executor,
              arrange, multiply);
}

}  // namespace any4
