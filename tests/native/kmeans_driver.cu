// Runs the solver on rows of many lengths, in buffers that end where the arrays end, and sees that what it says a row
// costs is finite; test_cuda_sanitizers.py runs it under compute-sanitizer. Prints the number of cases; fails at the
// first wrong one.
#include "device.h"
#include "kmeans.h"

namespace {

// Whose weights: none, one row's for all, or each row's own.
enum class Weights { kNone, kShared, kOwn };

void Solve(int length, int clusters, Weights which, int64_t count) {
  std::vector<float> values(count * length), weights(which == Weights::kOwn ? count * length : length);
  for (auto& v : values) v = static_cast<float>(std::rand() % 1000) / 7;
  for (auto& v : weights) v = static_cast<float>(std::rand() % 5);
  const Device<float> x(values), w(weights), centroids(count * clusters), inertia(count);
  const Device<uint8_t> codes(values.size());
  const any4::KMeansRows rows{x.get(),
                              which == Weights::kNone ? nullptr : w.get(),
                              which == Weights::kOwn ? length : 0,
                              count,
                              length,
                              clusters};
  const any4::Slots slots = any4::KMeansSlots(rows);
  const Device<uint8_t> scratch(slots.count * slots.bytes);
  const any4::KMeansResult result{centroids.get(), codes.get(), inertia.get()};
  Need(any4::SolveKMeans(rows, result, slots, scratch.get(), nullptr), "the launch");
  for (const float cost : inertia.Download()) {
    if (std::isfinite(cost)) continue;
    std::printf("%d values, %d clusters: inertia %f\n", length, clusters, cost);
    std::exit(1);
  }
}

}  // namespace

int main() {
  int cases = 0;
  for (const Weights which : {Weights::kNone, Weights::kShared, Weights::kOwn}) {
    for (const int clusters : {1, 2, 16}) {
      for (const int length : {1, 33, 160, 600}) Solve(length, clusters, which, 3), ++cases;
    }
    Solve(5000, 16, which, 1), ++cases;
  }
  std::printf("%d cases\n", cases);
}
