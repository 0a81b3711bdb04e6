#include "lut_product.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "lut_kernel.h"
#include "products.h"
#include "lut_turned.h"

namespace any4 {
namespace {

float ToFloat(uint16_t bf16) {
  const uint32_t bits = uint32_t{bf16} << 16;
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
float ToFloat(float value) { return value; }

// Copies a row of x in the order of lut_kernel.h, and sums it over groups unless `sums` is null.
template <class T>
void ArrangeRow(const T* x, int64_t k, int64_t lanes, int64_t codes, bool half, int64_t group_size, int64_t stride,
                float* values, float* sums, int64_t sums_stride) {
  const int64_t block = lanes * codes;
  const int64_t whole = k / block * block;
  for (int64_t first = 0; first < whole; first += block) {
    for (int64_t lane = 0; lane < lanes; ++lane) {
      for (int64_t j = 0; j < codes; ++j) values[first + j * lanes + lane] = ToFloat(x[first + lane * codes + j]);
    }
  }
  std::fill(values + whole, values + stride, 0.0f);
  const int64_t last_codes = half ? codes / 2 : codes;
  for (int64_t i = whole; i < k; ++i) {
    const int64_t within = i - whole;
    values[whole + within % last_codes * lanes + within / last_codes] = ToFloat(x[i]);
  }
  if (sums == nullptr) return;
  std::fill(sums, sums + sums_stride, 0.0f);
  for (int64_t begin = 0, g = 0; begin < k; begin += group_size, ++g) {
    float sum = 0;
    for (int64_t i = begin; i < std::min(begin + group_size, k); ++i) sum += ToFloat(x[i]);
    sums[g] = sum;
  }
}

// The rows from `begin` on, where a tile of turned scales begins.
Weight TileOf(const Weight& weight, int64_t begin) {
  Weight tile = weight;
  tile.n -= begin;
  tile.codes += begin * PlaneBytes(weight.k, LowBits(weight.bits));
  if (HighBits(weight.bits) > 0) tile.high += begin * PlaneBytes(weight.k, HighBits(weight.bits));
  if (weight.lut_rows > 1) {
    const int64_t row_bytes = (int64_t{1} << weight.bits) * ItemBytes(weight.lut_type);
    tile.lut = static_cast<const char*>(weight.lut) + begin * row_bytes;
  }
  return tile;
}

// Multiplies rows [begin, end), one tile, whose scales are turned. Scratch is the kernels', then that of TurnedBytes.
template <class Multiply>
void MultiplyTile(const Weight& weight, const LutKernel& kernel, const TurnedKernel& turned, const Input& input,
                  int64_t begin, int64_t end, const Output& output, float* scratch, const Multiply& multiply) {
  const int64_t groups = weight.groups();
  char* const memory = reinterpret_cast<char*>(scratch + ScratchFloats(weight, input));
  auto* const floats = reinterpret_cast<float*>(memory + 2 * TurnedTile::Bytes(groups));
  Weight tile = TileOf(weight, begin);
  Output to = output;
  to.y = static_cast<char*>(output.y) + begin * ItemBytes(output.type);
  const Turned &scales = *weight.turned_scales, *offsets = weight.turned_offsets;
  TurnedTile of_scales(scales, memory), of_offsets(offsets != nullptr ? *offsets : scales, memory + TurnedTile::Bytes(groups));
  turned.gather(scales, begin, of_scales);
  if (offsets != nullptr) turned.gather(*offsets, begin, of_offsets);
  const bool bits = scales.bits == 3 && (offsets == nullptr || offsets->bits == 3);
  if (kernel.few_turned != nullptr && input.rows == 1 && bits && !input.half &&
      weight.group_size == CodesPerWord(weight.bits)) {
    return kernel.few_turned(tile, input, of_scales, offsets != nullptr ? &of_offsets : nullptr, end - begin, to,
                             scratch);
  }
  turned.decode(scales, of_scales, end - begin, floats);
  tile.scales = floats;
  tile.scales_type = Type::kFloat32;
  if (offsets != nullptr) {
    turned.decode(*offsets, of_offsets, end - begin, floats + kTurnedRows * groups);
    tile.offsets = floats + kTurnedRows * groups;
    tile.offsets_type = Type::kFloat32;
  }
  const Product product{tile, nullptr};
  for (int64_t first = 0; first < end - begin; first += kTaskRows) {
    multiply(&product, first, std::min(first + kTaskRows, end - begin), to);
  }
}

int64_t TurnedBytes(int64_t groups) {
  return 2 * TurnedTile::Bytes(groups) + 2 * kTurnedRows * groups * static_cast<int64_t>(sizeof(float));
}

}  // namespace

void LutProducts(const Product* products, int64_t count, int64_t planes, const void* x, int64_t m, Type type, Isa isa,
                 const Executor& executor) {
  const std::vector<Product> sums_of = FirstPlanes(products, count, planes);
  if (m == 0 || RowsOf(sums_of.data(), count) == 0) return;
  const bool any_offsets =
      std::any_of(products, products + count * planes, [](const Product& p) {
        return p.weight.offsets != nullptr || p.weight.turned_offsets != nullptr;
      });
  const Weight& shape = products[0].weight;
  const LutKernel& kernel =
      KernelFor(isa, PortableKernel(shape.bits), Avx2Kernel(shape.bits), Avx512Kernel(shape.bits));
  const int64_t codes = CodesPerWord(shape.bits);
  const int64_t block = kernel.lanes * codes;
  const int64_t groups = shape.groups();

  Input input{};
  input.blocks = (shape.k + block - 1) / block;
  input.stride = input.blocks * block + kLineFloats;
  input.padding = 16;
  input.sums_stride = groups + input.padding;
  input.whole_lanes = groups == 1 || shape.group_size % codes == 0;
  input.half = input.whole_lanes && EndsInHalf(shape.bits, shape.k, block);
  input.whole_blocks = groups == 1 || shape.group_size % block == 0;
  std::vector<int32_t> group(input.blocks), relative(input.blocks * kernel.lanes);
  for (int64_t b = 0; b < input.blocks; ++b) {
    const int64_t lane_codes = input.half && b == input.blocks - 1 ? codes / 2 : codes;
    group[b] = static_cast<int32_t>(b * block / shape.group_size);
    for (int64_t lane = 0; lane < kernel.lanes; ++lane) {
      const int64_t of_lane = std::min((b * block + lane * lane_codes) / shape.group_size, groups - 1);
      relative[b * kernel.lanes + lane] = static_cast<int32_t>(of_lane) - group[b];
    }
  }
  input.group = group.data();
  input.relative = relative.data();

  const int64_t pass_rows = std::min(m, kInputRows);
  const auto values = Allocate<float>(pass_rows * input.stride);
  const auto sums = any_offsets ? Allocate<float>(pass_rows * input.sums_stride) : nullptr;
  input.values = values.get();
  input.sums = sums.get();

  const auto arrange = [&](int64_t first, int64_t row) {
    const int64_t start = (first + row) * shape.k;
    float* to = values.get() + row * input.stride;
    float* to_sums = sums ? sums.get() + row * input.sums_stride : nullptr;
    const auto of = [&](const auto* typed) {
      ArrangeRow(typed + start, shape.k, kernel.lanes, codes, input.half, shape.group_size, input.stride, to, to_sums,
                 input.sums_stride);
    };
    type == Type::kFloat32 ? of(static_cast<const float*>(x)) : of(static_cast<const uint16_t*>(x));
  };
  const TurnedKernel& turned = KernelFor(isa, PortableTurned(), Avx2Turned(), Avx512Turned());
  const auto multiply = [&](const Product& product, int64_t begin, int64_t end, int64_t rows, const Output& output,
                            char* scratch) {
    Input of_pass = input;
    of_pass.rows = rows;
    auto* const floats = reinterpret_cast<float*>(scratch);
    const auto run = [&](const Product* first, int64_t from, int64_t to, const Output& out) {
      if (planes == 1 && (rows <= 2 || rows == 4) && input.whole_lanes) {
        return kernel.few(first->weight, of_pass, from, to, out, floats);
      }
      kernel.many(first, planes, of_pass, from, to, out, floats);
    };
    const Product* first = products + (&product - sums_of.data()) * planes;
    if (first->weight.turned_scales == nullptr) return run(first, begin, end, output);
    MultiplyTile(first->weight, kernel, turned, of_pass, begin, end, output, floats, run);
  };
  // A task is one tile of turned scales, which sums of planes don't have.
  const bool any_turned =
      std::any_of(products, products + count, [](const Product& p) { return p.weight.turned_scales != nullptr; });
  const int64_t scratch_bytes =
      ScratchFloats(shape, input) * static_cast<int64_t>(sizeof(float)) + (any_turned ? TurnedBytes(groups) : 0);
  const int64_t unit = any_turned ? kTurnedRows : kDecodedRows, most = any_turned ? kTurnedRows : kTaskRows;
  ForProducts(sums_of.data(), count, m, type, {kInputRows, unit, most, scratch_bytes}, executor, arrange, multiply);
}

}  // namespace any4
