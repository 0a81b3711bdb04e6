// Runs the refit with and without offsets, for tables of all sizes and groups that do and don't fill a row, in buffers
// that end where the arrays end; test_cuda_sanitizers.py runs it under compute-sanitizer. Prints the number of cases;
// fails at the first wrong one.
#include "device.h"
#include "refit.h"

namespace {

void Refit(int length, int group_size, int levels, bool with_offsets) {
  constexpr int64_t kRows = 12;
  const int groups = (length + group_size - 1) / group_size;
  std::vector<float> values(kRows * length), importance(length), table;
  for (auto& v : values) v = static_cast<float>(std::rand() % 1000 - 500) / 250;
  for (auto& v : importance) v = static_cast<float>(std::rand() % 5);
  for (int i = 0; i < kRows * levels; ++i) table.push_back(static_cast<float>(i % levels - levels / 2));
  const Device<float> w(values), h(importance), lut(table), scales(std::vector<float>(kRows * groups, 0.25f)),
      offsets(std::vector<float>(kRows * groups, 0.03125f));
  const Device<float> new_lut(table.size()), new_scales(kRows * groups), new_offsets(kRows * groups);
  const any4::RefitRows rows{w.get(), h.get(),    lut.get(),  scales.get(), with_offsets ? offsets.get() : nullptr,
                             kRows,   length,     group_size, groups,       levels};
  const any4::RefitOptions options{1, 3, 0, levels, 0.01f, 3, 2, {0.9f, 1.0f, 1.1f}, {0, 0.5f, 1}, 7, 7, 10};
  const any4::RefitResult result{new_lut.get(), new_scales.get(), with_offsets ? new_offsets.get() : nullptr};
  const any4::Slots slots = any4::RefitSlots(rows);
  const Device<uint8_t> scratch(slots.count * slots.bytes);
  Need(any4::Refit(rows, options, result, slots, scratch.get(), nullptr), "the launch");
  for (const float entry : new_lut.Download()) {
    if (std::isfinite(entry)) continue;
    std::printf("%d inputs in groups of %d, %d levels: an entry is %f\n", length, group_size, levels, entry);
    std::exit(1);
  }
}

}  // namespace

int main() {
  int cases = 0;
  for (const bool offsets : {false, true}) {
    for (const int levels : {4, 8, 16}) {
      for (const int length : {5, 70, 600}) {
        for (const int group_size : {3, 64, 600}) {
          if (group_size > length) continue;
          Refit(length, group_size, levels, offsets), ++cases;
        }
      }
    }
  }
  std::printf("%d cases\n", cases);
}
