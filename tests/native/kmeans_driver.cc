// Runs the solver's code of every instruction set on rows of many lengths, in buffers that end where the arrays end:
// exact solutions against a quadratic dynamic program in double, Lloyd's against their own codes; built with sanitizers
// by test_native_build.py. Prints the number of cases; fails at the first wrong one.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <random>
#include <vector>

#include "kmeans.h"
#include "pool.h"
#include "rows.h"

namespace {

using any4::KMeansStart;

struct Case {
  int64_t length, clusters;
  bool weighted, ties;
};

// Fewer values than clusters, one value, whole vectors and a bit more, many equal values.
constexpr Case kCases[] = {
    {1, 16, false, false}, {5, 16, true, false},  {16, 16, false, false}, {33, 4, true, false},
    {64, 8, false, true},  {100, 16, true, true}, {257, 16, true, false}, {300, 2, false, false},
};
constexpr int64_t kRows = 6;

struct Problem {
  std::vector<float> values, weights;
};

Problem Draw(const Case& c, int64_t row) {
  std::mt19937 random(static_cast<unsigned>(c.length * 100 + row));
  std::normal_distribution<float> normal;
  Problem p;
  for (int64_t i = 0; i < c.length; ++i) {
    const float value = normal(random);
    p.values.push_back(c.ties ? std::round(value * 2) : value);
    p.weights.push_back(c.weighted ? std::abs(normal(random)) + 0.01f : 1);
  }
  return p;
}

// The least weighted sum of squares of a partition into `clusters` intervals.
double Optimum(const Problem& p, int64_t clusters) {
  const auto n = static_cast<int64_t>(p.values.size());
  std::vector<int64_t> order(n);
  for (int64_t i = 0; i < n; ++i) order[i] = i;
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return p.values[a] < p.values[b]; });
  std::vector<double> best(n + 1, std::numeric_limits<double>::infinity());
  best[0] = 0;
  for (int64_t c = 0; c < clusters; ++c) {
    std::vector<double> next(n + 1, std::numeric_limits<double>::infinity());
    next[0] = 0;
    for (int64_t begin = 0; begin < n; ++begin) {
      double mass = 0, mean = 0, cost = 0;
      for (int64_t end = begin; end < n; ++end) {
        const double w = p.weights[order[end]], d = p.values[order[end]] - mean;
        mass += w;
        mean += d * w / mass;
        cost += w * d * (p.values[order[end]] - mean);
        next[end + 1] = std::min(next[end + 1], best[begin] + cost);
      }
    }
    best = next;
  }
  return best[n];
}

// Whether the results belong together, and their cost in double.
bool Consistent(const Problem& p, const std::vector<float>& centroids, const std::vector<uint8_t>& codes,
                double* cost) {
  *cost = 0;
  if (!std::is_sorted(centroids.begin(), centroids.end())) return false;
  for (size_t i = 0; i < codes.size(); ++i) {
    if (codes[i] >= centroids.size()) return false;
    const double d = double{p.values[i]} - centroids[codes[i]];
    *cost += p.weights[i] * d * d;
  }
  return true;
}

std::vector<float> Numbers(const Case& c) {
  std::mt19937 random(7);
  std::uniform_real_distribution<float> uniform(0.01f, 0.99f);
  std::vector<float> numbers(std::max<int64_t>(c.length, c.clusters * 4));
  for (float& number : numbers) number = uniform(random);
  std::sort(numbers.begin(), numbers.begin() + c.clusters);
  return numbers;
}

bool Check(const Case& c, const any4::KMeansKernel& kernel, const any4::KMeansOptions& options, int64_t row,
           char* scratch) {
  const Problem p = Draw(c, row);
  std::vector<float> centroids(c.clusters);
  std::vector<uint8_t> codes(c.length);
  float inertia = -1;
  kernel.solve({p.values.data(), c.weighted ? p.weights.data() : nullptr, c.length}, options, scratch,
               {centroids.data(), codes.data(), &inertia});

  double cost;
  const bool consistent = Consistent(p, centroids, codes, &cost);
  const double optimum = Optimum(p, c.clusters), slack = 1e-5 * (1 + optimum);
  const bool exact = options.start == KMeansStart::kNone;
  if (consistent && std::abs(cost - inertia) <= slack && cost >= optimum - slack &&
      (!exact || cost <= optimum + slack)) {
    return true;
  }
  std::printf("length=%ld clusters=%ld start=%d row=%ld: cost %g, inertia %g, least %g\n", long(c.length),
              long(c.clusters), int(options.start), long(row), cost, inertia, optimum);
  return false;
}

}  // namespace

int main() {
  int cases = 0;
  for (const any4::Isa isa : InstructionSets()) {
    const auto& kernel = any4::KernelFor(isa, any4::PortableKMeans(), any4::Avx2KMeans(), any4::Avx512KMeans());
    for (const auto start : {KMeansStart::kNone, KMeansStart::kPlusPlus, KMeansStart::kRandom, KMeansStart::kSpread,
                             KMeansStart::kQuantile}) {
      for (const Case& c : kCases) {
        const std::vector<float> numbers = Numbers(c);
        const any4::KMeansOptions options{c.clusters, start, numbers.data(), 4, 50, 0};
        const int64_t bytes = kernel.scratch_bytes(c.length, options);
        std::atomic<int64_t> right{0};
        {
          Pool pool;
          any4::ForRows(pool.executor(1 + cases % 3), kRows, bytes, [&](int64_t begin, int64_t end, char* scratch) {
            for (int64_t row = begin; row < end; ++row) right += Check(c, kernel, options, row, scratch);
          });
        }
        if (right != kRows) return EXIT_FAILURE;
        ++cases;
      }
    }
  }
  std::printf("%d cases\n", cases);
  return EXIT_SUCCESS;
}
