// Runs decode attention over KVQuant caches of both sizes of heads, all widths and both dtypes, with lengths at the edges of
// tiles and of what is exact, and windows, in buffers that end where the arrays end, with NaN for all that no query sees;
// test_cuda_sanitizers.py runs it under compute-sanitizer. All values are alike, so the mixture must be them. Prints the
// number of cases; fails at the first wrong one.
#include <algorithm>

#include "device.h"
#include "kvquant.h"

namespace {

struct Case {
  int rows, groups, shared, size, bits, slots, channel_bytes, sinks, recent, room, own, window;
  bool half, rotates;
};

void Attend(const Case& c) {
  const int heads = c.groups * c.shared, pairs = c.rows * c.groups, low = c.size / (c.bits == 4 ? 2 : 4);
  const uint16_t one = c.half ? 0x3C00 : 0x3F80, nan = 0xFFFF;
  const int last = std::min(c.own, c.room + c.recent - 1), first = c.window == 0 ? 0 : std::max(last - c.window + 1, 0);
  const int coded = std::max(last - c.recent + 1, 0), turns = (c.room + c.recent + any4::kTurn - 1) / any4::kTurn;
  const int64_t tokens = int64_t{c.rows} * c.room;
  // Scale and offset of a value, and its outliers.
  std::vector<uint16_t> ranges(2 * tokens), outliers(tokens * c.slots);
  for (int64_t t = 0; t < tokens; ++t) {
    const bool seen = t % c.room >= std::max(first, c.sinks) && t % c.room < coded;
    ranges[2 * t] = seen ? 0 : nan, ranges[2 * t + 1] = seen ? one : nan;
    std::fill_n(outliers.begin() + t * c.slots, c.slots, seen ? one : nan);
  }
  std::vector<uint16_t> sinks(int64_t{pairs} * c.sinks * c.size, nan), ring(int64_t{pairs} * c.recent * c.size, nan);
  for (size_t i = 0; i < sinks.size(); ++i) {
    const int token = i / c.size % c.sinks;
    if (token >= first && token <= last) sinks[i] = one;
  }
  for (int token = std::max(first, coded); token <= last; ++token) {
    for (int p = 0; p < pairs; ++p) {
      std::fill_n(ring.begin() + (int64_t{p} * c.recent + token % c.recent) * c.size, c.size, one);
    }
  }
  std::vector<uint8_t> channels;
  for (int64_t i = 0; i < tokens * c.slots; ++i) {
    const int channel = i * 37 % (c.groups * c.size);
    channels.push_back(static_cast<uint8_t>(channel));
    if (c.channel_bytes == 2) channels.push_back(static_cast<uint8_t>(channel >> 8));
  }
  const Device<uint8_t> codes(std::vector<uint8_t>(pairs * int64_t{c.room} * low, 0x5A)),
      high(std::vector<uint8_t>(c.bits == 3 ? pairs * int64_t{c.room} * c.size / 8 : 0, 0xA5)), places(channels);
  const Device<uint16_t> q(std::vector<uint16_t>(c.rows * heads * c.size, one)), kept(outliers), ranged(ranges),
      exact(sinks), recent(ring), mixed(c.rows * heads * c.size);
  const Device<float> levels(std::vector<float>(1 << c.bits, 0.25f)), channel(std::vector<float>(c.groups * c.size, 0.5f)),
      cos(std::vector<float>(any4::kTurn * c.size / 2, 0.8f)), turn(std::vector<float>(turns * c.size / 2, 0.6f)),
      partials(int64_t{c.rows} * heads * any4::kMostParts * (c.size + 2));
  const Device<int> positions(std::vector<int>(c.rows, c.own));
  const any4::AttentionStep token{q.get(), nullptr, nullptr, recent.get(), recent.get(), nullptr, positions.get(), nullptr,
                                  nullptr, nullptr, mixed.get(), partials.get(), c.rows, heads, c.groups, c.size, c.recent,
                                  0.125f, 0, c.window};
  const any4::KVQuantCodes keys{{codes.get(), c.bits == 3 ? high.get() : nullptr}, kept.get(), places.get(), nullptr, levels.get()};
  any4::KVQuantCodes values = keys;
  values.ranges = ranged.get();
  const any4::KVQuantStep step{token, keys, values, channel.get(), channel.get(), exact.get(), exact.get(),
                               c.rotates ? cos.get() : nullptr, cos.get(), turn.get(), turn.get(), c.bits, c.room, c.slots,
                               c.channel_bytes, c.sinks};
  Need(c.half ? any4::AttendKVQuantFloat16(step, nullptr) : any4::AttendKVQuantBfloat16(step, nullptr), "the launch");
  for (const uint16_t bits : mixed.Download()) {
    if (bits == one) continue;
    std::printf("size %d, %d bits, %d slots, %d and %d exact, token %d, window %d: %04x\n", c.size, c.bits, c.slots, c.sinks,
                c.recent, c.own, c.window, bits);
    std::exit(1);
  }
}

}  // namespace

int main() {
  int cases = 0;
  for (const bool half : {false, true}) {
    for (const int size : {64, 128}) {
      for (const int bits : {4, 3, 2}) {
        Attend({2, 2, 3, size, bits, 4, 2, 1, 16, 512, 400, 0, half, true}), ++cases;
        Attend({1, 1, 8, size, bits, 12, 1, 5, 40, 200, 239, 70, half, false}), ++cases;
      }
    }
    for (const int own : {0, 15, 16, 47, 48, 63, 64, 71, 300}) {
      for (const int window : {0, 1, 40}) Attend({1, 3, 2, 64, 4, 48, 1, 20, 48, 24, own, window, half, true}), ++cases;
    }
    Attend({1, 1, 2, 64, 3, 0, 1, 0, 0, 72, 71, 0, half, true}), ++cases;
    Attend({40, 4, 9, 128, 4, 2, 2, 1, 8, 64, 60, 0, half, true}), ++cases;
    Attend({1, 2, 4, 128, 4, 12, 2, 1, 128, 8192, 8100, 0, half, true}), ++cases;
  }
  std::printf("%d cases\n", cases);
}
