#include "byte_product.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "byte_kernel.h"
#include "products.h"

namespace any4 {

const ByteKernel& ByteKernelFor(Isa isa) {
  const ByteKernel* const vbmi = isa >= Isa::kAvx512Vbmi ? Avx512VbmiByteKernel() : nullptr;
  const ByteKernel* const vnni = isa >= Isa::kAvx512Vnni ? Avx512VnniByteKernel() : nullptr;
  const ByteKernel* const avxvnni = isa == Isa::kAvxVnni ? AvxVnniByteKernel() : nullptr;
  const ByteKernel* const avx2 = isa >= Isa::kAvx2 ? Avx2ByteKernel() : nullptr;
  const ByteKernel* const dotprod = isa == Isa::kDotProd ? DotProdByteKernel() : nullptr;
  for (const ByteKernel* kernel : {vbmi, vnni, avxvnni, avx2, dotprod}) {
    if (kernel != nullptr) return *kernel;
  }
  return *PortableByteKernel();
}

namespace {

void GroupProducts(const Product* products, int64_t count, const void* x, int64_t m, Type type, Isa isa,
                  const Executor& executor) {
  const Weight& shape = products[0].weight;
  const ByteKernel& kernel = ByteKernelFor(isa);
  const int64_t lanes = kernel.lanes, step = 8 * lanes, groups = shape.groups();

  ByteInput input{};
  input.k = shape.k;
  input.group_size = shape.group_size;
  input.groups = groups;
  input.steps = (shape.k + step - 1) / step;
  input.whole_steps = groups <= 1 || shape.group_size % step == 0;
  std::vector<int32_t> group(input.steps), relative(input.steps * lanes), ends(input.steps);
  const auto group_at = [&](int64_t k) { return static_cast<int32_t>(std::min(k, shape.k - 1) / shape.group_size); };
  for (int64_t s = 0, first = 0; s < input.steps; ++s) {
    const bool fits = group_at((s + 1) * step - 1) - group_at(first * step) < lanes;
    if (!kernel.reads_stored || !fits) first = s;
    group[s] = group_at(first * step);
    for (int64_t i = 0; i < lanes; i += 4) {
      std::fill_n(relative.begin() + s * lanes + i, 4, group_at(s * step + i / 4 * kGroup) - group[s]);
    }
    std::fill(ends.begin() + first, ends.begin() + s + 1, static_cast<int32_t>(s + 1));
  }
  input.group = group.data();
  input.relative = relative.data();
  input.ends = ends.data();

  const int64_t pass_rows = std::min(m, kByteInputRows);
  const auto values = Allocate<int8_t>(pass_rows * input.steps * step);
  const auto starts = Allocate<int32_t>(pass_rows * input.steps * lanes);
  const auto scales = Allocate<float>(pass_rows * input.steps * lanes);
  const auto totals = Allocate<int32_t>(pass_rows * input.steps * (lanes / 4));
  const auto sums = Allocate<float>(pass_rows * groups);
  input.rows = pass_rows;
  input.totals = totals.get();
  input.values = values.get();
  input.starts = starts.get();
  input.scales = scales.get();
  input.sums = sums.get();

  const auto round = [&](int64_t first, int64_t row) {
    kernel.round(static_cast<const char*>(x) + first * shape.k * ItemBytes(type), type, shape.bits, input, row);
  };
  const auto multiply = [&](const Product& product, int64_t begin, int64_t end, int64_t rows, const Output& output,
                            char* scratch) {
    ByteInput of_pass = input;
    of_pass.rows = rows;
    kernel.multiply(product.weight, of_pass, begin, end, output, scratch);
  };
  const Passes passes{kByteInputRows, kernel.reads_stored && pass_rows >= kManyInputs ? kManyRows : kByteRows,
                      kByteTaskRows, ByteScratch(shape, input, kernel)};
  ForProducts(products, count, m, type, passes, executor, round, multiply);
}

void TokenProducts(const Product* products, int64_t count, const void* x, int64_t m, Type type, const Rounding& rounding,
                   Isa isa, const Executor& executor) {
  const Weight& shape = products[0].weight;
  const ByteKernel& kernel = ByteKernelFor(isa);
  const int64_t step = 4 * kernel.lanes / kernel.token_bytes, line = 64 / kernel.token_bytes;
  const int64_t pass_rows = std::min(m, kByteInputRows), places = pass_rows + 1;

  TokenInput input{};
  input.k = shape.k;
  input.group_size = std::min(shape.group_size, shape.k);
  input.groups = shape.groups();
  input.group_steps = (input.group_size + step - 1) / step;
  input.last_steps = (shape.k - (input.groups - 1) * input.group_size + step - 1) / step;
  const int64_t integers = ((input.groups - 1) * input.group_steps + input.last_steps) * step;
  input.stride = (integers + line - 1) / line * line + line;
  input.ones = rounding.symmetric ? -1 : pass_rows;
  const auto values = Allocate<char>(places * input.stride * kernel.token_bytes);
  const auto starts = Allocate<int32_t>(places * input.groups * kernel.lanes);
  const auto floats = Allocate<float>(places * (input.groups + 2));
  input.values = values.get();
  input.starts = starts.get();
  input.sums = floats.get();
  input.scales = input.sums + places * input.groups;
  input.zeros = input.scales + places;
  if (input.ones >= 0) kernel.round_token(x, type, rounding, input, 0, input.ones);

  const auto round = [&](int64_t first, int64_t row) { kernel.round_token(x, type, rounding, input, first, row); };
  const auto multiply = [&](const Product& product, int64_t begin, int64_t end, int64_t rows, const Output& output,
                            char* scratch) {
    TokenInput of_pass = input;
    of_pass.rows = rows;
    kernel.multiply_token(product.weight, of_pass, begin, end, output, scratch);
  };
  const int64_t scratch_bytes = kTokenRows * input.stride * kernel.token_bytes + ByteRowsScratch(shape);
  ForProducts(products, count, m, type, {pass_rows, kTokenRows, kByteTaskRows, scratch_bytes}, executor, round,
              multiply);
}

}  // namespace

void ByteProducts(const Product* products, int64_t count, const void* x, int64_t m, Type type, const Rounding& rounding,
                  Isa isa, const Executor& executor) {
  if (m == 0 || RowsOf(products, count) == 0) return;
  if (products[0].weight.k == 0) {
    for (const Product* product = products; product < products + count; ++product) {
      std::memset(product->y, 0, m * product->weight.n * ItemBytes(type));
    }
    return;
  }
  if (rounding.by_row) {
    TokenProducts(products, count, x, m, type, rounding, isa, executor);
  } else {
    GroupProducts(products, count, x, m, type, isa, executor);
  }
}

}  // namespace any4
