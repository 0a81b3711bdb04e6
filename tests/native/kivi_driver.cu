// Runs decode attention over KIVI caches of both sizes of heads, all widths and groups, lengths at the edges of tiles and
// flushes, windows, and both dtypes, in buffers that end where the arrays end, with NaN for all keys that no query sees;
// test_cuda_sanitizers.py runs it under compute-sanitizer. All values are alike, so the mixture must be them. Prints the
// number of cases; fails at the first wrong one.
#include <algorithm>

#include "device.h"
#include "kivi.h"

namespace {

struct Case {
  int rows, groups, shared, size, residual, group_size, key_bits, value_bits, positions, own, window;
  bool half;
};

void Attend(const Case& c) {
  const int heads = c.groups * c.shared, pairs = c.rows * c.groups;
  const uint16_t one = c.half ? 0x3C00 : 0x3F80, nan = 0xFFFF;
  const int whole = c.own / c.residual * c.residual, value_groups = std::max(c.size / c.group_size, 1);
  const int key_groups = c.positions / c.group_size;
  std::vector<uint16_t> steps(int64_t{pairs} * c.size * key_groups, nan);
  for (size_t i = 0; i < steps.size(); ++i) {
    if (static_cast<int>(i % key_groups) * c.group_size < whole) steps[i] = one;
  }
  const int64_t values_count = int64_t{pairs} * c.positions;
  const std::vector<uint16_t> ring(int64_t{pairs} * c.residual * c.size, one), fresh(pairs * c.size, one);
  const Device<uint16_t> q(std::vector<uint16_t>(c.rows * heads * c.size, one)), k(fresh), v(fresh), keys(ring), values(ring),
      key_steps(steps), key_lowest(steps), value_steps(std::vector<uint16_t>(values_count * value_groups, 0)),
      value_lowest(std::vector<uint16_t>(values_count * value_groups, one)), mixed(c.rows * heads * c.size);
  const Device<uint8_t> key_codes(int64_t{pairs} * c.size * c.positions * c.key_bits / 8),
      value_codes(std::vector<uint8_t>(values_count * c.size * c.value_bits / 8, 0x5A));
  const Device<int> length(std::vector<int>{c.own}), positions(std::vector<int>(c.rows, c.own)),
      start(std::vector<int>(c.rows, 0));
  const Device<float> cos(std::vector<float>(c.rows * c.size / 2, 0.8f)), sin(std::vector<float>(c.rows * c.size / 2, 0.6f)),
      partials(int64_t{c.rows} * heads * any4::kMostParts * (c.size + 2));
  const any4::AttentionStep token{q.get(), k.get(), v.get(), keys.get(), values.get(), length.get(), positions.get(),
                                  start.get(), cos.get(), sin.get(), mixed.get(), partials.get(), c.rows, heads, c.groups,
                                  c.size, c.residual, 0.125f, 0, c.window};
  const any4::KiviStep step{token, key_codes.get(), key_steps.get(), key_lowest.get(), value_codes.get(),
                            value_steps.get(), value_lowest.get(), c.key_bits, c.value_bits, c.group_size, c.positions,
                            c.positions};
  Need(c.half ? any4::AttendKiviFloat16(step, nullptr) : any4::AttendKiviBfloat16(step, nullptr), "the launch");
  if (length.Download()[0] != c.own + 1) std::printf("the length isn't written\n"), std::exit(1);
  for (const uint16_t bits : mixed.Download()) {
    if (bits == one) continue;
    std::printf("size %d, groups of %d, %d and %d bits, token %d, window %d: %04x\n", c.size, c.group_size, c.key_bits,
                c.value_bits, c.own, c.window, bits);
    std::exit(1);
  }
}

}  // namespace

int main() {
  int cases = 0;
  for (const bool half : {false, true}) {
    for (const int size : {64, 128}) {
      for (const int bits : {4, 2}) {
        for (const int group_size : {32, 64, 128}) {
          Attend({2, 2, 3, size, 128, group_size, bits, 6 - bits, 512, 400, 0, half}), ++cases;
          Attend({1, 1, 8, size, 64 * group_size / 32, group_size, bits, bits, 2048, 2047, 0, half}), ++cases;
        }
      }
    }
    for (const int own : {0, 63, 64, 127, 128, 191, 255}) {
      for (const int window : {0, 1, 100}) Attend({1, 3, 2, 64, 64, 32, 4, 2, 256, own, window, half}), ++cases;
    }
    Attend({40, 4, 4, 128, 64, 32, 4, 4, 64, 127, 0, half}), ++cases;
    Attend({1, 2, 4, 128, 64, 32, 4, 4, 8192, 8100, 0, half}), ++cases;
  }
  std::printf("%d cases\n", cases);
}
