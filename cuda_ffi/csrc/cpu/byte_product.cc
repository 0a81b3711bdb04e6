#include "byte_product.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "byte_kernel.h"
#include "products.h"

namespace any4 {
namespace {

// The best kernel within an instruction set that the library was built with.
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

}  // namespace

void ByteProducts(const Product* products, int64_t count, const void* x, int64_t m, Type type, Isa isa,
                  const Executor& executor) {
  if (m == 0 || RowsOf(products, count) == 0) return;
  if (products[0].weight.k == 0) {
    for (const Product* product = products; product < products + count; ++product) {
      std::memset(product->y, 0, m * product->weight.n * ItemBytes(type));
    }
    return;
  }
  const Weight& shape = products[0].weight;
  const ByteKernel& kernel = ByteKernelFor(isa);
  const int64_t lanes = kernel.lanes, step = 8 * lanes, groups = shape.groups();

  ByteInput input{};
  input.k = shape.k;
  input.group_size = shape.group_size;
  input.groups = groups;
  input.steps = (shape.k + step - 1) / step;
  input.whole_steps = groups <= 1 || shape.group_size % step == 0;
  std::vector<int32_t> group(input.steps), relative(input.whole_steps ? 0 : input.steps * lanes);
  for (int64_t s = 0; s < input.steps; ++s) group[s] = static_cast<int32_t>(s * step / shape.group_size);
  for (size_t i = 0; i < relative.size(); i += 4) {
    const auto of_lanes = static_cast<int32_t>(std::min(static_cast<int64_t>(i) / 4 * kGroup, shape.k - 1) / shape.group_size);
    std::fill_n(relative.begin() + i, 4, of_lanes - group[i / lanes]);
  }
  input.group = group.data();
  input.relative = relative.data();

  const int64_t pass_rows = std::min(m, kByteInputRows);
  const auto values = Allocate<int8_t>(pass_rows * input.steps * step);
  const auto starts = Allocate<int32_t>(pass_rows * input.steps * lanes);
  const auto scales = Allocate<float>(pass_rows * input.steps * lanes);
  const auto sums = Allocate<float>(pass_rows * groups);
  input.values = values.get();
  input.starts = starts.get();
  input.scales = scales.get();
  input.sums = sums.get();

  const auto round = [&](int64_t first, int64_t row) {
    kernel.round(static_cast<const char*>(x) + first * shape.k * ItemBytes(type), type, shape.bits, input, row);
  };
  const auto multiply = [&](const Weight& weight, int64_t begin, int64_t end, int64_t rows, const Output& output,
                            char* scratch) {
    ByteInput of_pass = input;
    of_pass.rows = rows;
    kernel.multiply(weight, of_pass, begin, end, output, reinterpret_cast<float*>(scratch));
  };
  const int64_t scratch_bytes = ByteScratchFloats(shape) * static_cast<int64_t>(sizeof(float));
  ForProducts(products, count, m, type, {kByteInputRows, kByteRows, kByteTaskRows, scratch_bytes}, executor, round,
              multiply);
}

}  // namespace any4
