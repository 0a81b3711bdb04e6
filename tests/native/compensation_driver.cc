// Runs error compensation's code of every instruction set on blocks of many forms, in buffers that end where the arrays
// end: each code must be that of the level nearest to its value, and each error what is left of its weight, in double;
// built with sanitizers by test_native_build.py. Prints the number of cases; fails at the first wrong one.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "compensation.h"
#include "pool.h"
#include "rows.h"

namespace {

struct Case {
  int64_t columns, rows, levels;
  bool uniform, offsets;
};

// One weight, less than a panel and a tile, whole ones, and more.
constexpr Case kCases[] = {
    {1, 1, 16, false, false}, {7, 5, 16, true, true},   {8, 16, 2, false, true},
    {48, 33, 8, true, false}, {19, 100, 4, false, true}, {130, 40, 256, false, true},
};

struct Problem {
  std::vector<float> own, wanted, corner, table, scales, offsets;
};

Problem Draw(const Case& c) {
  std::mt19937 random(static_cast<unsigned>(c.columns));
  std::normal_distribution<float> normal;
  Problem p;
  const auto draw = [&](std::vector<float>* to, int64_t count, float size) {
    for (int64_t i = 0; i < count; ++i) to->push_back(size * normal(random));
  };
  draw(&p.own, c.columns * c.rows, 1);
  draw(&p.wanted, c.columns * c.rows, 1);
  draw(&p.corner, c.columns * c.columns, 0.02f);
  if (c.offsets) draw(&p.offsets, c.columns * c.rows, 0.5f);
  for (int64_t i = 0; i < c.rows * c.levels; ++i) {
    const auto ramp = static_cast<float>(i % c.levels - c.levels / 2);
    p.table.push_back(c.uniform ? ramp : ramp * std::abs(ramp));
  }
  for (int64_t i = 0; i < c.columns * c.rows; ++i) p.scales.push_back(i % 11 == 0 ? 0 : 3.0f / float(c.levels));
  return p;
}

bool Right(const Case& c, const Problem& p, const std::vector<uint8_t>& codes, const std::vector<float>& errors) {
  for (int64_t row = 0; row < c.rows; ++row) {
    const float* const table = p.table.data() + row * c.levels;
    for (int64_t i = 0; i < c.columns; ++i) {
      const int64_t at = i * c.rows + row;
      double value = p.wanted[at];
      for (int64_t j = 0; j < i; ++j) value += double{p.corner[j * c.columns + i]} * errors[j * c.rows + row];
      const double scale = p.scales[at], offset = c.offsets ? p.offsets[at] : 0;
      const double u = scale == 0 ? 0 : (value - offset) / scale;
      if (codes[at] >= c.levels) return false;
      double nearest = std::abs(u - table[0]);
      for (int64_t e = 1; e < c.levels; ++e) nearest = std::min(nearest, std::abs(u - table[e]));
      if (std::abs(u - table[codes[at]]) > nearest + 1e-4 * (1 + std::abs(u))) return false;
      const double left = p.own[at] - (table[codes[at]] * scale + offset);
      if (!(std::abs(errors[at] - left) < 1e-5)) return false;
    }
  }
  return true;
}

bool Check(const Case& c, const any4::CompensationKernel& kernel, int64_t threads) {
  const Problem p = Draw(c);
  std::vector<uint8_t> codes(c.columns * c.rows);
  std::vector<float> errors(c.columns * c.rows, std::nanf(""));
  const any4::CompensationBlock block{p.own.data(),
                                      p.wanted.data(),
                                      p.corner.data(),
                                      p.table.data(),
                                      p.scales.data(),
                                      c.offsets ? p.offsets.data() : nullptr,
                                      c.rows,
                                      c.columns,
                                      c.levels,
                                      c.uniform,
                                      codes.data(),
                                      errors.data()};
  {
    Pool pool;
    const int64_t tiles = (c.rows + kernel.tile - 1) / kernel.tile;
    any4::ForRows(
        pool.executor(threads), tiles, kernel.scratch_bytes(block),
        [&](int64_t begin, int64_t end, char* scratch) { kernel.compensate(block, begin, end, scratch); });
  }
  if (Right(c, p, codes, errors)) return true;
  std::printf("columns=%ld rows=%ld levels=%ld: a code or an error is wrong\n", long(c.columns), long(c.rows),
              long(c.levels));
  return false;
}

}  // namespace

int main() {
  int cases = 0;
  for (const any4::Isa isa : InstructionSets()) {
    const auto& kernel =
        any4::KernelFor(isa, any4::PortableCompensation(), any4::Avx2Compensation(), any4::Avx512Compensation());
    for (const Case& c : kCases) {
      if (!Check(c, kernel, 1 + cases % 3)) return EXIT_FAILURE;
      ++cases;
    }
  }
  std::printf("%d cases\n", cases);
  return EXIT_SUCCESS;
}
