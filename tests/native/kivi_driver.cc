// Runs attention over KIVI caches by every instruction set's code, of all sizes of heads, widths and both dtypes, at the
// edges of chunks and flushes, in buffers that end where the arrays end, with NaN for what no query sees; built with
// sanitizers by test_native_build.py. All values are one, so the mixture must be. Prints the number of cases; fails at the
// first wrong one.
#include <vector>

#include "attention_parts.h"
#include "kivi.h"
#include "either.h"

namespace {

struct Case {
  int64_t groups, shared, size, residual, group_size, key_bits, value_bits, key_positions, value_positions;
  int32_t own;
  int64_t window;
};

constexpr Case kCases[] = {
    {2, 1, 32, 16, 16, 2, 4, 32, 32, 0, 0},         {1, 3, 64, 64, 32, 4, 4, 320, 256, 255, 0},
    {2, 4, 128, 128, 32, 4, 2, 640, 576, 640, 100}, {1, 2, 256, 64, 64, 2, 2, 1408, 1408, 1407, 0},
    {1, 5, 64, 192, 192, 4, 2, 384, 384, 390, 0},   {1, 1, 128, 32, 16, 2, 4, 96, 64, 95, 0},
};

bool Check(const Case& c, const any4::KiviKernel& kernel, any4::Type type, int64_t threads) {
  const int64_t rows = 2, pairs = rows * c.groups, heads = c.groups * c.shared;
  // The second row is padding.
  const std::vector<int32_t> positions{c.own, -1};
  const Numbers queries(type, rows * heads * c.size, 0.5f), ring(type, pairs * c.residual * c.size, 1);
  const int64_t key_groups = c.key_positions / c.group_size, value_groups = std::max<int64_t>(c.size / c.group_size, 1);
  const int64_t whole = c.own - c.own % c.residual, coded = std::max<int64_t>(c.own - c.residual + 1, 0);
  const auto seen = [&](int64_t count, int64_t each, int64_t last, float value) {
    return Numbers(type, count, value, [=](int64_t i) { return i % each < last; });
  };
  const Numbers steps = seen(pairs * c.size * key_groups, key_groups, whole / c.group_size, 0.125f);
  const int64_t each = c.value_positions * value_groups;
  const Numbers flat = seen(pairs * each, each, coded * value_groups, 0), ones = seen(pairs * each, each, coded * value_groups, 1);
  const std::vector<uint8_t> key_codes(pairs * c.size * c.key_positions * c.key_bits / 8, 0x5A);
  const std::vector<uint8_t> value_codes(pairs * c.value_positions * c.size * c.value_bits / 8, 0xA5);
  Numbers mixed(type, rows * heads * c.size, 7);
  const any4::KiviStep step{queries.data(), ring.data(),   ring.data(),      key_codes.data(),  steps.data(),
                            steps.data(),   value_codes.data(), flat.data(), ones.data(),       positions.data(),
                            type,           rows,          heads,            c.groups,          c.size,
                            c.residual,     c.group_size,  c.key_bits,       c.value_bits,      c.key_positions,
                            c.value_positions, 0.1f,       c.own % 2 * 3.0f, c.window};
  {
    Pool pool;
    any4::AttendInParts(pool.executor(threads), step, kernel, {mixed.data(), c.size, type});
  }
  return IsMixed(mixed, heads * c.size, rows * heads * c.size, c.size, c.own);
}

}  // namespace

int main() {
  return CheckAll(kCases, [](const Case& c, any4::Isa isa, any4::Type type, int64_t threads) {
    return Check(c, any4::KernelFor(isa, any4::PortableKivi(), any4::Avx2Kivi(), any4::Avx512Kivi()), type, threads);
  });
}
