// Runs the code of every instruction set for attention over a dense cache on odd shapes, in buffers that end where the
// arrays end, against sums in double; built with sanitizers by test_native_build.py. Prints the number of cases; fails at
// the first wrong one.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "dense.h"
#include "pool.h"
#include "rows.h"

namespace {

struct Shape {
  int64_t rows, tokens, groups, shared, size, slots, used, window;
};

// Tokens of a part of a block and of several, scores that end within a register and with the cache, and a window.
constexpr Shape kShapes[] = {{1, 1, 2, 3, 64, 40, 20, 0}, {2, 9, 1, 5, 16, 21, 12, 0}, {1, 17, 3, 1, 80, 300, 283, 7},
                             {1, 1, 1, 2, 32, 8, 7, 0},   {2, 3, 2, 4, 48, 600, 590, 400}};

bool Check(const Shape& s, any4::Isa isa, int64_t threads) {
  std::mt19937 random(static_cast<unsigned>(s.slots));
  std::uniform_real_distribution<float> uniform(-1, 1);
  const int64_t pairs = s.rows * s.groups, heads = s.groups * s.shared, all = s.rows * s.tokens;
  const auto draw = [&](int64_t count) {
    std::vector<float> drawn(count);
    for (float& value : drawn) value = uniform(random);
    return drawn;
  };
  const std::vector<float> queries = draw(all * heads * s.size), new_keys = draw(all * s.groups * s.size),
                           new_values = draw(all * s.groups * s.size);
  std::vector<float> keys = draw(pairs * s.size * s.slots), values = draw(pairs * s.slots * s.size);
  std::vector<int32_t> start(s.rows), positions(all);
  for (int64_t row = 0; row < s.rows; ++row) start[row] = static_cast<int32_t>(3 * row);
  for (int64_t i = 0; i < all; ++i) positions[i] = static_cast<int32_t>(s.used + i % s.tokens - start[i / s.tokens]);
  const any4::DenseStep step{queries.data(), new_keys.data(), new_values.data(), keys.data(), values.data(),
                             positions.data(), start.data(), nullptr, nullptr, any4::Type::kFloat32, s.rows, s.tokens,
                             heads, s.groups, s.size, s.slots, 0.5f, 0, s.window};
  const auto& kernel = any4::KernelFor(isa, any4::PortableDense(), any4::Avx2Dense(), any4::Avx512Dense());
  const int64_t pitch = any4::kAttentionSums + s.size, of_block = step.block_heads() * pitch;
  std::vector<float> found(pairs * step.blocks() * of_block);
  {
    Pool pool;
    const any4::Executor executor = pool.executor(threads);
    any4::ParallelFor(executor, pairs, [&](int64_t pair) { kernel.append(step, pair); });
    any4::ForTasks(executor, pairs * step.blocks(), kernel.scratch_bytes(step), [&](int64_t i, char* scratch) {
      kernel.attend(step, i / step.blocks(), i % step.blocks(), 0, s.slots, found.data() + i * of_block, scratch);
    });
  }
  for (int64_t token = 0; token < all; ++token) {
    for (int64_t head = 0; head < heads; ++head) {
      const int64_t pair = token / s.tokens * s.groups + head / s.shared, within = token % s.tokens;
      const float* const q = queries.data() + (token * heads + head) * s.size;
      std::vector<double> mixed(s.size);
      double total = 0;
      for (int64_t slot = step.first(token); slot <= step.own(token); ++slot) {
        double score = 0;
        for (int64_t c = 0; c < s.size; ++c) score += static_cast<double>(q[c]) * keys[(pair * s.size + c) * s.slots + slot];
        const double weight = std::exp(0.5 * score);
        total += weight;
        for (int64_t c = 0; c < s.size; ++c) mixed[c] += weight * values[(pair * s.slots + slot) * s.size + c];
      }
      const int64_t place = pair * step.blocks() + within / any4::kBlockTokens;
      const int64_t of_token = within % any4::kBlockTokens * s.shared + head % s.shared;
      std::vector<float> got(s.size);
      kernel.combine(found.data() + place * of_block + of_token * pitch, 1, pitch, s.size, 0,
                     {got.data(), s.size, any4::Type::kFloat32});
      for (int64_t c = 0; c < s.size; ++c) {
        if (!(std::abs(got[c] - mixed[c] / total) <= 1e-5)) {
          std::printf("slots=%ld isa=%d: channel %ld of token %ld, head %ld is %g, not %g\n", long(s.slots), int(isa), long(c),
                      long(token), long(head), got[c], mixed[c] / total);
          return false;
        }
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
      if (!Check(shape, isa, 1 + cases % 3)) return EXIT_FAILURE;
      ++cases;
    }
  }
  std::printf("%d cases\n", cases);
  return EXIT_SUCCESS;
}
