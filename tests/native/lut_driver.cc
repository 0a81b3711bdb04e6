// Runs the products' code of every instruction set on odd shapes, in buffers that end where the arrays end, against
// sums in double; built with sanitizers by test_native_build.py. Prints the number of cases; fails at the first wrong
// one.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <utility>
#include <vector>

#include "lut_binary.h"
#include "lut_kernel.h"
#include "lut_product.h"
#include "lut_turned.h"
#include "pool.h"

namespace {

struct Shape {
  int64_t m, n, k, group_size;
  bool row_tables, offsets, e8m0;
  int turned = 0;  // bits of scales and offsets that are coded themselves
};

// Rows of x for every kernel, tasks that end unevenly, words and groups that end within a block, chunks of K, one code;
// then coded scales, of whole tiles, and of rows that end within a chunk or a byte; those of 3 bits have ranges in bf16.
constexpr Shape kShapes[] = {
    {1, 7, 300, 32, true, true, false},   {2, 5, 515, 64, false, false, false}, {3, 9, 130, 7, true, true, false},
    {4, 66, 2100, 128, true, true, false}, {7, 13, 96, 16, true, false, true},   {100, 9, 264, 8, true, true, false},
    {1, 1, 1, 1, false, true, false},     {5, 6, 33, 33, true, true, true},     {1, 3, 4097, 128, true, true, false},
    {1, 128, 96, 16, true, true, false, 3}, {1, 150, 560, 16, false, true, false, 3}, {7, 70, 300, 16, false, true, false, 2},
    {2, 5, 40, 8, true, false, false, 4},
};

uint16_t ToBfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return static_cast<uint16_t>(bits >> 16);
}

double FromBfloat16(uint16_t value) {
  const uint32_t bits = uint32_t{value} << 16;
  float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

void PutCode(std::vector<uint8_t>& plane, int64_t row_bytes, int64_t row, int64_t k, int width, int code) {
  plane[row * row_bytes + k * width / 8] |= static_cast<uint8_t>(code << (k * width % 8));
}

// Coded values [n, columns], in runs of 16 rows, and what they stand for.
struct Coded {
  std::vector<uint8_t> low, high;
  std::vector<float> scales, offsets;
  std::vector<uint16_t> scales16, offsets16;
  std::vector<double> values;
  any4::Turned turned{};

  Coded(int64_t n, int64_t columns, int bits, std::mt19937& random) : values(n * columns) {
    constexpr int64_t kRun = 16;
    const int low_bits = any4::LowBits(bits), high_bits = any4::HighBits(bits);
    const int64_t low_bytes = any4::PlaneBytes(n, low_bits), high_bytes = any4::PlaneBytes(n, high_bits);
    const int64_t runs = (n + kRun - 1) / kRun;
    std::uniform_real_distribution<float> uniform(-1, 1);
    low.resize(columns * low_bytes);
    high.resize(columns * high_bytes);
    scales.resize(columns * runs);
    offsets.resize(columns * runs);
    const auto fill = [&](std::vector<float>& wide, std::vector<uint16_t>& narrow) {
      for (float& v : wide) narrow.push_back(ToBfloat16(uniform(random))), v = FromBfloat16(narrow.back());
    };
    fill(scales, scales16);
    fill(offsets, offsets16);
    for (int64_t c = 0; c < columns; ++c) {
      for (int64_t i = 0; i < n; ++i) {
        const int code = static_cast<int>(random() % (1u << bits));
        PutCode(low, low_bytes, c, i, low_bits, code & ((1 << low_bits) - 1));
        if (high_bits > 0) PutCode(high, high_bytes, c, i, high_bits, code >> low_bits);
        const int64_t run = c * runs + i / kRun;
        values[i * columns + c] = (code / 2.0 - 1) * scales[run] + offsets[run];
      }
    }
    turned = {n, columns, kRun, bits, low.data(), high.data(), -1.0f, 0.5f};
    turned.type = bits == 3 ? any4::Type::kBfloat16 : any4::Type::kFloat32;
    turned.scales = bits == 3 ? static_cast<const void*>(scales16.data()) : scales.data();
    turned.offsets = bits == 3 ? static_cast<const void*>(offsets16.data()) : offsets.data();
  }
};

struct Plane {
  std::vector<uint8_t> codes, low, high, exponents;
  std::vector<uint16_t> lut, scales, offsets;
  std::vector<Coded> coded;  // scales, then offsets

  Plane(const Shape& s, int bits, std::mt19937& random) {
    std::uniform_real_distribution<float> uniform(-1, 1);
    const int low_bits = any4::LowBits(bits), high_bits = any4::HighBits(bits);
    const int64_t low_bytes = any4::PlaneBytes(s.k, low_bits), high_bytes = any4::PlaneBytes(s.k, high_bits);
    const int64_t groups = (s.k + s.group_size - 1) / s.group_size, size = int64_t{1} << bits;
    codes.resize(s.n * s.k), low.resize(s.n * low_bytes), high.resize(s.n * high_bytes), exponents.resize(s.n * groups);
    lut.resize((s.row_tables ? s.n : 1) * size), scales.resize(s.n * groups), offsets.resize(s.n * groups);
    for (int64_t i = 0; i < s.n * s.k; ++i) {
      codes[i] = static_cast<uint8_t>(random() % size);
      PutCode(low, low_bytes, i / s.k, i % s.k, low_bits, codes[i] & ((1 << low_bits) - 1));
      if (high_bits > 0) PutCode(high, high_bytes, i / s.k, i % s.k, high_bits, codes[i] >> low_bits);
    }
    for (uint16_t& v : lut) v = ToBfloat16(uniform(random));
    for (uint16_t& v : scales) v = ToBfloat16(uniform(random));
    for (uint16_t& v : offsets) v = ToBfloat16(uniform(random));
    for (uint8_t& v : exponents) v = static_cast<uint8_t>(120 + random() % 8);
    for (int i = 0; s.turned > 0 && i < 2; ++i) coded.emplace_back(s.n, groups, s.turned, random);
  }

  any4::Weight weight(const Shape& s, int bits) const {
    using any4::Type;
    any4::Weight w{};
    w.n = s.n;
    w.k = s.k;
    w.bits = bits;
    w.group_size = s.group_size;
    w.codes = low.data();
    w.high = high.data();
    w.lut = lut.data();
    w.lut_rows = s.row_tables ? s.n : 1;
    w.lut_type = Type::kBfloat16;
    w.scales = s.e8m0 ? static_cast<const void*>(exponents.data()) : scales.data();
    w.scales_type = s.e8m0 ? Type::kE8m0 : Type::kBfloat16;
    w.offsets = s.offsets ? offsets.data() : nullptr;
    w.offsets_type = Type::kBfloat16;
    if (s.turned > 0) {
      w.scales = w.offsets = nullptr;
      w.turned_scales = &coded[0].turned;
      if (s.offsets) w.turned_offsets = &coded[1].turned;
    }
    return w;
  }

  // The entry times the scale, and the offset, of a weight.
  std::pair<double, double> Terms(const Shape& s, int bits, int64_t n, int64_t k) const {
    const int64_t group = n * ((s.k + s.group_size - 1) / s.group_size) + k / s.group_size;
    const double scale = s.e8m0 ? std::ldexp(1.0, exponents[group] - 127) : FromBfloat16(scales[group]);
    const double entry = FromBfloat16(lut[((s.row_tables ? n : 0) << bits) + codes[n * s.k + k]]);
    if (s.turned > 0) return {entry * coded[0].values[group], s.offsets ? coded[1].values[group] : 0};
    return {entry * scale, s.offsets ? FromBfloat16(offsets[group]) : 0};
  }
};

using Function = decltype(&any4::LutProducts);

bool Check(const Shape& s, int bits, int64_t planes_count, Function multiply, any4::Type type, any4::Isa isa,
           int64_t thread_count) {
  std::mt19937 random(static_cast<unsigned>(s.k * 8 + bits));
  std::uniform_real_distribution<float> uniform(-1, 1);
  std::vector<Plane> planes;
  for (int64_t p = 0; p < planes_count; ++p) planes.emplace_back(s, bits, random);
  std::vector<float> x(s.m * s.k), y(s.m * s.n, NAN);
  std::vector<uint16_t> x16(x.size()), y16(y.size(), 0x7fc0);
  for (size_t i = 0; i < x.size(); ++i) {
    x16[i] = ToBfloat16(uniform(random));
    x[i] = static_cast<float>(FromBfloat16(x16[i]));
  }

  const bool is_float = type == any4::Type::kFloat32;
  std::vector<any4::Product> products;
  for (const Plane& plane : planes) {
    products.push_back({plane.weight(s, bits), is_float ? static_cast<void*>(y.data()) : y16.data()});
  }
  {
    Pool pool;
    multiply(products.data(), 1, planes_count, is_float ? static_cast<void*>(x.data()) : x16.data(), s.m, type, isa,
             pool.executor(thread_count));
  }
  for (int64_t m = 0; m < s.m; ++m) {
    for (int64_t n = 0; n < s.n; ++n) {
      double sum = 0, magnitude = 0;
      for (const Plane& plane : planes) {
        for (int64_t k = 0; k < s.k; ++k) {
          const auto [scaled, offset] = plane.Terms(s, bits, n, k);
          sum += x[m * s.k + k] * (scaled + offset);
          magnitude += std::abs(x[m * s.k + k]) * (std::abs(scaled) + std::abs(offset));
        }
      }
      const double got = is_float ? y[m * s.n + n] : FromBfloat16(y16[m * s.n + n]);
      const double tolerance = 3e-6 * magnitude + (is_float ? 0 : std::abs(sum) / 256);
      if (!(std::abs(got - sum) <= tolerance)) {
        std::printf("m=%ld n=%ld k=%ld g=%ld bits=%d isa=%d: y[%ld, %ld] is %g, not %g\n", long(s.m), long(s.n),
                    long(s.k), long(s.group_size), bits, int(isa), long(m), long(n), got, sum);
        return false;
      }
    }
  }
  return true;
}

}  // namespace

int main() {
  int cases = 0;
  for (const any4::Isa isa : InstructionSets()) {
    for (int bits : {1, 2, 3, 4, 5, 6, 8}) {
      for (const Shape& shape : kShapes) {
        const auto check = [&](int64_t planes, Function multiply) {
          const any4::Type type = cases % 2 == 0 ? any4::Type::kFloat32 : any4::Type::kBfloat16;
          return Check(shape, bits, planes, multiply, type, isa, 1 + cases++ % 4);
        };
        if (!check(1, &any4::LutProducts)) return EXIT_FAILURE;
        if (bits > 1 || shape.turned > 0) continue;
        if (!check(3, &any4::LutProducts)) return EXIT_FAILURE;
        if (any4::HasBinaryGroups(shape.k, shape.group_size) && !check(3, &any4::BinaryProducts)) return EXIT_FAILURE;
      }
    }
  }
  std::printf("%d cases\n", cases);
  return EXIT_SUCCESS;
}
