// Runs the refit's code of every instruction set on rows of many forms, in buffers that end where the arrays end: no
// row's error, in double, may rise, and most must fall; built with sanitizers by test_native_build.py. Prints the number
// of cases; fails at the first wrong one.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "pool.h"
#include "refit.h"
#include "rows.h"

namespace {

struct Case {
  int64_t inputs, group_size, entries, first, stop;
  bool offsets;
};

// One weight, one group, parts of groups, short last groups, more groups than lanes, small tables, held entries.
constexpr Case kCases[] = {
    {1, 1, 16, 0, 16, true},   {70, 70, 16, 0, 16, true}, {33, 8, 16, 0, 16, false}, {40, 16, 8, 1, 7, true},
    {300, 16, 4, 0, 4, false}, {17, 1, 16, 0, 16, true},  {128, 32, 16, 0, 0, true}, {515, 32, 2, 0, 2, true},
};
constexpr int64_t kRows = 6;
constexpr float kFactors[] = {1, 0.8f, 1.2f}, kHeld[] = {0, 0, 1};

struct Problem {
  std::vector<float> weights, importance, tables, scales, offsets;
};

Problem Draw(const Case& c, const any4::RefitOptions& options) {
  std::mt19937 random(static_cast<unsigned>(c.inputs));
  std::normal_distribution<float> normal;
  Problem p;
  for (int64_t i = 0; i < kRows * c.inputs; ++i) p.weights.push_back(normal(random));
  for (int64_t i = 0; i < c.inputs; ++i) p.importance.push_back(i % 5 == 0 ? 0 : std::abs(normal(random)));
  for (int64_t i = 0; i < kRows * c.entries; ++i) {
    p.tables.push_back(static_cast<float>(i % c.entries) - 0.5f * static_cast<float>(c.entries - 1));
  }
  // Scales that bfloat16 holds, and offsets of zero.
  p.scales.assign(kRows * options.groups(), 5.0f / 16);
  if (c.offsets) p.offsets.assign(kRows * options.groups(), 0);
  return p;
}

double Error(const Case& c, const any4::RefitOptions& options, const Problem& p, int64_t row) {
  double error = 0;
  for (int64_t i = 0; i < c.inputs; ++i) {
    const int64_t group = row * options.groups() + i / c.group_size;
    double nearest = std::numeric_limits<double>::infinity();
    for (int64_t e = 0; e < c.entries; ++e) {
      const double level = double{p.tables[row * c.entries + e]} * p.scales[group] + (c.offsets ? p.offsets[group] : 0);
      nearest = std::min(nearest, std::abs(p.weights[row * c.inputs + i] - level));
    }
    error += p.importance[i] * nearest * nearest;
  }
  return error;
}

bool Check(const Case& c, const any4::RefitKernel& kernel, int64_t threads) {
  any4::RefitOptions options{};
  options.inputs = c.inputs;
  options.group_size = c.group_size;
  options.entries = c.entries;
  options.first = c.first;
  options.stop = c.stop;
  options.searches = 1;
  options.max_rounds = 20;
  options.settled = 1e-3f;
  options.factors = kFactors;
  options.held = kHeld;
  options.starts = 3;
  options.fits = 2;
  options.table_mantissa = 7;
  options.scale_mantissa = 10;
  options.offset_mantissa = 23;
  const Problem start = Draw(c, options);
  Problem fit = start;
  const int64_t groups = options.groups();
  const auto refit = [&](int64_t begin, int64_t end, char* scratch) {
    kernel.refit({end - begin, fit.weights.data() + begin * c.inputs, fit.importance.data(),
                  fit.tables.data() + begin * c.entries, fit.scales.data() + begin * groups,
                  c.offsets ? fit.offsets.data() + begin * groups : nullptr},
                 options, scratch);
  };
  {
    Pool pool;
    any4::ForRows(pool.executor(threads), kRows, kernel.scratch_bytes(options), refit);
  }
  double before = 0, after = 0;
  for (int64_t row = 0; row < kRows; ++row) {
    const double old_error = Error(c, options, start, row), new_error = Error(c, options, fit, row);
    before += old_error;
    after += new_error;
    if (new_error <= old_error * (1 + 1e-6)) continue;
    std::printf("inputs=%ld row=%ld: error %g, before %g\n", long(c.inputs), long(row), new_error, old_error);
    return false;
  }
  if (before == 0 || after < 0.9 * before) return true;
  std::printf("inputs=%ld: errors %g, before %g\n", long(c.inputs), after, before);
  return false;
}

}  // namespace

int main() {
  int cases = 0;
  for (const any4::Isa isa : InstructionSets()) {
    const auto& kernel = any4::KernelFor(isa, any4::PortableRefit(), any4::Avx2Refit(), any4::Avx512Refit());
    for (const Case& c : kCases) {
      if (!Check(c, kernel, 1 + cases % 3)) return EXIT_FAILURE;
      ++cases;
    }
  }
  std::printf("%d cases\n", cases);
  return EXIT_SUCCESS;
}
