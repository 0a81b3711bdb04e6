// Runs attention over KVQuant caches by every instruction set's code, of all widths and both dtypes, with and without
// outliers, first and newest tokens and a rotation, in buffers that end where the arrays end; built with sanitizers by
// test_native_build.py. All values are one, so the mixture must be. Prints the number of cases; fails at the first wrong
// one.
#include <vector>

#include "attention_parts.h"
#include "either.h"
#include "kvquant.h"

namespace {

struct Case {
  int64_t groups, shared, size, room, slots, channel_bytes, sinks, recent, bits;
  int32_t own;
  int64_t window;
  bool rotates;
};

constexpr Case kCases[] = {
    {2, 1, 32, 40, 2, 1, 1, 16, 4, 0, 0, true},   {1, 3, 64, 300, 0, 1, 0, 0, 3, 299, 0, false},
    {3, 2, 96, 257, 4, 2, 2, 16, 2, 272, 33, true}, {1, 2, 256, 1100, 6, 1, 1, 0, 4, 1099, 0, true},
    {4, 1, 128, 64, 12, 2, 70, 8, 3, 65, 0, true},
};

bool Check(const Case& c, const any4::KVQuantKernel& kernel, any4::Type type, int64_t threads) {
  const int64_t rows = 2, pairs = rows * c.groups, heads = c.groups * c.shared, half = c.size / 2;
  // The second row is padding.
  const std::vector<int32_t> positions{c.own, -1};
  const int64_t low = c.bits == 4 ? c.size / 2 : c.size / 4, chunks = (c.room + c.recent + 255) / 256;
  const std::vector<uint8_t> codes(pairs * c.room * low, 0x5A), high(c.bits == 3 ? pairs * c.room * c.size / 8 : 0, 0xA5);
  std::vector<uint8_t> narrow;
  std::vector<uint16_t> wide;
  for (int64_t i = 0; i < rows * c.room * c.slots; ++i) {
    const int64_t channel = i * 37 % (c.groups * c.size);
    c.channel_bytes == 1 ? narrow.push_back(static_cast<uint8_t>(channel)) : wide.push_back(static_cast<uint16_t>(channel));
  }
  const void* const channels = c.channel_bytes == 1 ? static_cast<const void*>(narrow.data()) : wide.data();
  const Numbers queries(type, rows * heads * c.size, 0.5f), outliers(type, rows * c.room * c.slots, 1),
      ranges(type, rows * c.room * 2, 1), first(type, pairs * c.sinks * c.size, 1), recent(type, pairs * c.recent * c.size, 1);
  const std::vector<float> key_levels(size_t{1} << c.bits, 0.25f), value_levels(size_t{1} << c.bits, 0.0f),
      channel(c.groups * c.size, 0.5f), cos(256 * half, 0.8f), sin(256 * half, 0.6f), chunk_cos(chunks * half, 0.8f),
      chunk_sin(chunks * half, 0.6f);
  const auto high_of = [&] { return c.bits == 3 ? high.data() : nullptr; };
  Numbers mixed(type, rows * heads * c.size, 7);
  const any4::KVQuantStep step{
      queries.data(), {{codes.data(), high_of()}, outliers.data(), channels, nullptr, key_levels.data()},
      {{codes.data(), high_of()}, outliers.data(), channels, ranges.data(), value_levels.data()}, channel.data(),
      channel.data(), first.data(), first.data(), recent.data(), recent.data(), positions.data(),
      c.rotates ? cos.data() : nullptr, sin.data(), chunk_cos.data(), chunk_sin.data(), type, rows, heads, c.groups, c.size,
      c.room, c.slots, c.channel_bytes, c.sinks, c.recent, c.bits, 0.1f, c.own % 2 * 3.0f, c.window};
  {
    Pool pool;
    any4::AttendInParts(pool.executor(threads), step, kernel, {mixed.data(), c.size, type});
  }
  return IsMixed(mixed, heads * c.size, rows * heads * c.size, c.size, c.own);
}

}  // namespace

int main() {
  return CheckAll(kCases, [](const Case& c, any4::Isa isa, any4::Type type, int64_t threads) {
    return Check(c, any4::KernelFor(isa, any4::PortableKVQuant(), any4::Avx2KVQuant(), any4::Avx512KVQuant()), type, threads);
  });
}
