// Runs decode attention for heads of many sizes and numbers, lengths at the edges of tiles, windows, softcaps and both
// dtypes, in buffers that end where the arrays end, with NaN in all slots that no query sees; test_cuda_sanitizers.py
// runs it under compute-sanitizer. All values that are seen are alike, so the mixture must be them. Prints the number
// of cases; fails at the first wrong one.
#include <algorithm>

#include "attention.h"
#include "device.h"

namespace {

constexpr uint16_t kNan = 0xFFFF;

struct Case {
  int rows, groups, shared, size, slots, length, start, window;
  float softcap;
  bool half, rotates;
};

// The bits of 1 and -1 / 2, which the key's channels are, by turns.
uint16_t Bits(const Case& c, int64_t i) { return i % 3 == 0 ? (c.half ? 0x3C00 : 0x3F80) : (c.half ? 0xB800 : 0xBF00); }

void Attend(const Case& c) {
  const int heads = c.groups * c.shared, pairs = c.rows * c.groups;
  const int first = c.window == 0 ? c.start : std::max(c.start, c.length - c.window + 1);
  const uint16_t one = Bits(c, 0);
  std::vector<uint16_t> keys(int64_t{pairs} * c.size * c.slots, kNan), values(keys), queries(c.rows * heads * c.size);
  std::vector<uint16_t> new_keys(pairs * c.size), new_values(pairs * c.size, one);
  for (size_t i = 0; i < queries.size(); ++i) queries[i] = Bits(c, i);
  for (size_t i = 0; i < new_keys.size(); ++i) new_keys[i] = Bits(c, i + 1);
  for (int pair = 0; pair < pairs; ++pair) {
    for (int channel = 0; channel < c.size; ++channel) {
      for (int slot = first; slot < c.length; ++slot) {
        keys[(int64_t{pair} * c.size + channel) * c.slots + slot] = Bits(c, channel + slot);
        values[(int64_t{pair} * c.slots + slot) * c.size + channel] = one;
      }
    }
  }
  const int turns = c.rotates ? c.rows * c.size / 2 : 0;
  const Device<uint16_t> q(queries), k(new_keys), v(new_values), held_keys(keys), held_values(values), mixed(queries.size());
  const Device<int> length(std::vector<int>{c.length}), positions(std::vector<int>(c.rows, c.length - c.start)),
      start(std::vector<int>(c.rows, c.start));
  const Device<float> cos(std::vector<float>(turns, 0.8f)), sin(std::vector<float>(turns, 0.6f)),
      partials(int64_t{c.rows} * heads * any4::kMostParts * (c.size + 2));
  const any4::AttentionStep step{q.get(), k.get(), v.get(), held_keys.get(), held_values.get(), length.get(),
                                 positions.get(), start.get(), c.rotates ? cos.get() : nullptr,
                                 c.rotates ? sin.get() : nullptr, mixed.get(), partials.get(), c.rows, heads, c.groups,
                                 c.size, c.slots, 0.125f, c.softcap, c.window};
  Need(c.half ? any4::AttendFloat16(step, nullptr) : any4::AttendBfloat16(step, nullptr), "the launch");
  if (length.Download()[0] != c.length + 1) std::printf("the length isn't written\n"), std::exit(1);
  for (const uint16_t bits : mixed.Download()) {
    if (bits == one) continue;
    std::printf("size %d, %d shared, %d slots, length %d, start %d, window %d: %04x\n", c.size, c.shared, c.slots,
                c.length, c.start, c.window, bits);
    std::exit(1);
  }
}

}  // namespace

int main() {
  int cases = 0;
  for (const bool half : {false, true}) {
    for (const int size : {16, 64, 80, 128, 256}) {
      for (const int shared : {1, 4, 7, 16}) {
        Attend({2, 2, shared, size, 136, 133, 5, 0, 0, half, true}), ++cases;
        Attend({1, 1, shared, size, 2048, 2047, 0, 0, 0, half, false}), ++cases;
      }
    }
    for (const int length : {0, 7, 8, 31, 32, 63, 64, 255}) {
      for (const int window : {0, 1, 40}) Attend({1, 3, 2, 64, 256, length, 0, window, 3, half, true}), ++cases;
    }
    Attend({40, 4, 4, 64, 64, 50, 50, 0, 0, half, true}), ++cases;
  }
  std::printf("%d cases\n", cases);
}
