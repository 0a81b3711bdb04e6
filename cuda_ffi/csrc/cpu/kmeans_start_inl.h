// First centroids for Lloyd's iteration, as any4_jax/clustering/inits.py describes them. A row here is sorted, and
// values without weight pad it to whole vectors of lanes.
#pragma once

#include "kmeans.h"
#include "kmeans_row_inl.h"
#include "lanes_inl.h"
#include "sort_inl.h"

namespace any4 {
namespace {

// Running sums of masses that are not negative, one for each chunk, and the places where they pass a share of the
// total.
class Mass {
 public:
  static constexpr int64_t kChunk = 4 * kLanes;

  Mass(int64_t count, Scratch& scratch) : count_(count), mass_(scratch.Take<float>(Chunks() * kChunk)),
                                          before_(scratch.Take<double>(Chunks() + 1)) {}

  // mass(i): the masses of 16 values from i on.
  template <class Function>
  void Set(const Function& mass) {
    before_[0] = 0;
    for (int64_t chunk = 0; chunk < Chunks(); ++chunk) {
      Floats sum = All(0);
      for (int64_t i = chunk * kChunk; i < (chunk + 1) * kChunk; i += kLanes) {
        const Floats here = i < count_ ? mass(i) : All(0);
        Store(mass_ + i, here);
        sum = sum + here;
      }
      before_[chunk + 1] = before_[chunk] + SumOf(sum);
    }
  }

  // The first index whose running mass exceeds a fraction of the total, or the last index that has mass.
  int64_t At(float fraction) const {
    const double wanted = fraction * before_[Chunks()];
    int64_t low = 0, high = Chunks() - 1;
    while (low < high) {
      const int64_t middle = (low + high) / 2;
      if (before_[middle + 1] > wanted) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    // Rounding may leave the last chunk, or the sum within a chunk, without a value that exceeds the wanted mass.
    while (low > 0 && before_[low + 1] == before_[low]) --low;
    double sum = before_[low];
    int64_t found = low * kChunk;
    for (int64_t i = low * kChunk; i < (low + 1) * kChunk; ++i) {
      sum += mass_[i];
      if (mass_[i] > 0) found = i;
      if (sum > wanted) break;
    }
    return found;
  }

 private:
  int64_t Chunks() const { return (count_ + kChunk - 1) / kChunk; }

  int64_t count_;
  float* mass_;
  double* before_;
};

// Greedy k-means++ (Arthur and Vassilvitskii, 2007): takes the best of several draws by w * d^2. squared: d^2, [count].
inline void StartPlusPlus(const SortedRow& row, const KMeansOptions& options, Mass& mass, float* squared,
                          float* centroids) {
  const int64_t trials = options.trials;
  mass.Set([&](int64_t i) { return Load(row.w + i); });
  centroids[0] = row.x[mass.At(options.numbers[0])];
  for (int64_t i = 0; i < row.count; i += kLanes) Store(squared + i, All(__builtin_inff()));
  for (int64_t c = 1; c < options.clusters; ++c) {
    mass.Set([&](int64_t i) {
      const Floats apart = Load(row.x + i) - All(centroids[c - 1]);
      const Floats reduced = Minimum(Load(squared + i), apart * apart);
      Store(squared + i, reduced);
      return Load(row.w + i) * reduced;
    });
    float chosen[kMaxTrials] = {};
    Floats left[kMaxTrials];
    for (int64_t t = 0; t < trials; ++t) {
      chosen[t] = row.x[mass.At(options.numbers[c * trials + t])];
      left[t] = All(0);
    }
    for (int64_t i = 0; i < row.count; i += kLanes) {
      const Floats x = Load(row.x + i), w = Load(row.w + i), now = Load(squared + i);
      for (int64_t t = 0; t < trials; ++t) {
        const Floats apart = x - All(chosen[t]);
        left[t] = left[t] + w * Minimum(now, apart * apart);
      }
    }
    double least = SumOf(left[0]);
    centroids[c] = chosen[0];
    for (int64_t t = 1; t < trials; ++t) {
      const double here = SumOf(left[t]);
      if (here < least) {
        least = here;
        centroids[c] = chosen[t];
      }
    }
  }
}

// k values drawn without replacement in proportion to w: those with the smallest exponentials / w, in `arrivals`. After
// all values with weight come those without, and last the padding up to a power of two.
inline void StartRandom(const SortedRow& row, int64_t length, const KMeansOptions& options, float* arrivals,
                        float* centroids) {
  int64_t padded = 2;
  while (padded < length) padded *= 2;
  const int64_t wanted = options.clusters < padded ? options.clusters : padded;
  int64_t found = 0;
  for (int64_t i = 0; i < padded && (i < length || found < wanted); ++i) {
    const bool weighs = i < length && row.w[i] > 0;
    const float arrival = weighs ? options.numbers[i] / row.w[i] : __builtin_inff();
    if (found == wanted && !(arrival < arrivals[found - 1])) continue;
    int64_t place = found < wanted ? found++ : found - 1;
    for (; place > 0 && arrival < arrivals[place - 1]; --place) {
      arrivals[place] = arrivals[place - 1];
      centroids[place] = centroids[place - 1];
    }
    arrivals[place] = arrival;
    centroids[place] = row.x[i < length ? i : length - 1];
  }
  for (int64_t c = found; c < options.clusters; ++c) centroids[c] = centroids[0];
}

// Ascending centroids [clusters] to start from. length: that of the row without padding.
inline void Start(const SortedRow& row, int64_t length, const KMeansOptions& options, Scratch& scratch,
                  float* centroids) {
  const int64_t k = options.clusters;
  Mass mass(row.count, scratch);
  float* const spare = scratch.Take<float>(row.count > k ? row.count : k);
  if (scratch.measures()) return;
  if (options.start == KMeansStart::kPlusPlus) {
    StartPlusPlus(row, options, mass, spare, centroids);
  } else if (options.start == KMeansStart::kRandom) {
    StartRandom(row, length, options, spare, centroids);
  } else if (options.start == KMeansStart::kSpread) {
    const float range = row.x[length - 1] - row.x[0];
    for (int64_t c = 0; c < k; ++c) centroids[c] = row.x[0] + range * options.numbers[c];
  } else {
    mass.Set([&](int64_t i) { return Load(row.w + i); });
    for (int64_t c = 0; c < k; ++c) centroids[c] = row.x[mass.At(options.numbers[c])];
  }
  SortAscending(centroids, k);
}

}  // namespace
}  // namespace any4
