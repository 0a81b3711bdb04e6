// Runs the code of every instruction set for products of bytes on odd shapes, in buffers that end where the arrays end,
// against sums in double; built with sanitizers by test_native_build.py. Prints the number of cases; fails at the first
// wrong one.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#include "byte_kernel.h"
#include "byte_product.h"
#include "pool.h"

namespace {

struct Shape {
  int64_t m, n, k, group_size;
  bool row_tables, offsets;
};

// Rows of x for every tile, tasks that end unevenly, groups within a step, the whole row as one, one code, none.
constexpr Shape kShapes[] = {
    {1, 7, 300, 32, true, true},   {2, 5, 515, 64, false, false}, {3, 9, 130, 96, true, true},
    {17, 66, 640, 128, true, true}, {70, 9, 264, 1000, true, false}, {1, 1, 1, 1, false, true},
    {5, 6, 33, 33, true, true},    {1, 3, 4097, 128, true, true}, {1, 90, 2, 32, true, true},
    {2, 3, 0, 32, false, false},
};

// x rounded as the kernel rounds it.
std::vector<double> Rounded(const std::vector<float>& x, int64_t m, int64_t k, const any4::Rounding& how) {
  std::vector<double> rounded(x.size());
  if (how.by_row) {
    for (int64_t first = 0; first < m * k; first += k) {
      const auto [low, high] = std::minmax_element(x.begin() + first, x.begin() + first + k);
      const float half = static_cast<float>(1 << (how.bits - 1)), least = std::min(*low, 0.0f), most = std::max(*high, 0.0f);
      const float steps = how.symmetric ? half - 1 : 2 * half - 1;
      const float span = how.symmetric ? std::max(-least, most) : most - least;
      const float inverse = steps / span;
      volatile float start = least * inverse;
      const double zero = how.symmetric ? 0 : -half - std::nearbyint(start);
      for (int64_t i = first; i < first + k; ++i) {
        volatile float scaled = x[i] * inverse;
        const double q = std::clamp(std::nearbyint(scaled) + zero, -1.0 * half, half - 1.0);
        rounded[i] = (q - zero) * static_cast<double>(span) / steps;
      }
    }
    return rounded;
  }
  for (int64_t row = 0; row < m; ++row) {
    for (int64_t first = row * k; first < (row + 1) * k; first += any4::kGroup) {
      const int64_t end = std::min(first + any4::kGroup, (row + 1) * k);
      float largest = 0;
      for (int64_t i = first; i < end; ++i) largest = std::max(largest, std::abs(x[i]));
      const float inverse = 127.0f / largest;
      for (int64_t i = first; i < end; ++i) {
        volatile float scaled = x[i] * inverse;
        rounded[i] = std::nearbyint(scaled) * static_cast<double>(largest) / 127;
      }
    }
  }
  return rounded;
}

void PutCode(std::vector<uint8_t>& plane, int64_t row_bytes, int64_t row, int64_t k, int width, int code) {
  plane[row * row_bytes + k * width / 8] |= static_cast<uint8_t>(code << (k * width % 8));
}

bool Check(const Shape& s, int bits, bool ramp, const any4::Rounding& how, any4::Isa isa, int64_t thread_count) {
  std::mt19937 random(static_cast<unsigned>(s.k * 8 + bits));
  std::uniform_real_distribution<float> uniform(-1, 1);
  const int low_bits = any4::LowBits(bits), high_bits = any4::HighBits(bits);
  const int64_t low_bytes = any4::PlaneBytes(s.k, low_bits), high_bytes = any4::PlaneBytes(s.k, high_bits);
  const int64_t groups = (s.k + s.group_size - 1) / s.group_size;
  const int64_t tables = s.row_tables ? s.n : 1, size = int64_t{1} << bits;
  std::vector<uint8_t> codes(s.n * s.k), low(s.n * low_bytes), high(s.n * high_bytes);
  for (int64_t i = 0; i < s.n * s.k; ++i) {
    codes[i] = static_cast<uint8_t>(random() % size);
    PutCode(low, low_bytes, i / s.k, i % s.k, low_bits, codes[i] & ((1 << low_bits) - 1));
    if (high_bits > 0) PutCode(high, high_bytes, i / s.k, i % s.k, high_bits, codes[i] >> low_bits);
  }
  std::vector<int8_t> lut(tables * size);
  std::vector<float> steps(tables * size), scales(s.n * groups), offsets(s.n * groups);
  for (int8_t& v : lut) v = static_cast<int8_t>(random());
  for (int64_t i = 0; i < tables * size; ++i) steps[i] = static_cast<float>(i % size - size / 2) / 4 + 0.5f;
  for (float& v : scales) v = uniform(random);
  for (float& v : offsets) v = uniform(random);
  std::vector<float> x(s.m * s.k), y(s.m * s.n, NAN);
  for (float& v : x) v = uniform(random);

  any4::Weight w{};
  w.n = s.n;
  w.k = s.k;
  w.bits = bits;
  w.group_size = s.group_size;
  w.codes = low.data();
  w.high = high.data();
  w.lut = ramp ? static_cast<const void*>(steps.data()) : lut.data();
  w.lut_rows = tables;
  w.integers = !ramp;
  w.scales = scales.data();
  w.offsets = s.offsets ? offsets.data() : nullptr;
  const any4::Product product{w, y.data()};
  {
    Pool pool;
    any4::ByteProducts(&product, 1, x.data(), s.m, any4::Type::kFloat32, how, isa, pool.executor(thread_count));
  }
  const std::vector<double> rounded = Rounded(x, s.m, s.k, how);
  for (int64_t m = 0; m < s.m; ++m) {
    for (int64_t n = 0; n < s.n; ++n) {
      double sum = 0, magnitude = 0;
      for (int64_t k = 0; k < s.k; ++k) {
        const int64_t group = n * groups + k / s.group_size, entry = (s.row_tables ? n : 0) * size + codes[n * s.k + k];
        const double scaled = (ramp ? static_cast<double>(steps[entry]) : lut[entry]) * scales[group];
        const double offset = s.offsets ? offsets[group] : 0;
        sum += rounded[m * s.k + k] * (scaled + offset);
        magnitude += std::abs(rounded[m * s.k + k]) * (std::abs(scaled) + std::abs(offset));
      }
      const double got = y[m * s.n + n];
      // A zero point multiplies the sum of the weights.
      if (!(std::abs(got - sum) <= (how.symmetric ? 3e-6 : 1e-5) * magnitude)) {
        std::printf("m=%ld n=%ld k=%ld g=%ld bits=%d by_row=%d isa=%d: y[%ld, %ld] is %g, not %g\n", long(s.m), long(s.n),
                    long(s.k), long(s.group_size), bits, int(how.by_row), int(isa), long(m), long(n), got, sum);
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
    for (const Shape& shape : kShapes) {
      for (const auto& [bits, ramp] : {std::pair{4, false}, {4, true}, {8, true}, {3, false}, {6, true}}) {
        const any4::Rounding by_group{false, 8, true, nullptr, 0}, by_row{true, 8 - cases % 3, cases % 2 == 0, nullptr, 0};
        for (const any4::Rounding& how : {by_group, by_row}) {
          if (!Check(shape, bits, ramp, how, isa, 1 + cases % 4)) return EXIT_FAILURE;
          ++cases;
        }
      }
    }
  }
  std::printf("%d cases\n", cases);
  return EXIT_SUCCESS;
}
