// Runs error compensation of blocks of many sizes and tables of all sizes, in buffers that end where the arrays end,
// and sees that codes lie in their table and errors are finite; test_cuda_sanitizers.py runs it under
// compute-sanitizer. Prints the number of cases; fails at the first wrong one.
#include "compensation.h"
#include "device.h"

namespace {

std::vector<float> Numbers(int64_t count) {
  std::vector<float> values(count);
  for (auto& v : values) v = static_cast<float>(std::rand() % 1000 - 500) / 250;
  return values;
}

void Compensate(int columns, int64_t rows, int levels, bool with_offsets, bool uniform) {
  std::vector<float> above = Numbers(columns * columns), ramps;
  for (auto& v : above) v /= 64;
  for (int i = 0; i < rows * levels; ++i) ramps.push_back(static_cast<float>(i % levels - levels / 2));
  const Device<float> own(Numbers(columns * rows)), wanted(Numbers(columns * rows)), corner(above), table(ramps),
      scales(std::vector<float>(columns * rows, 0.25f)), offsets(with_offsets ? Numbers(columns * rows)
                                                                              : std::vector<float>{});
  const Device<uint8_t> codes(columns * rows);
  const Device<float> errors(columns * rows);
  const any4::CompensationBlock block{own.get(),    wanted.get(),
                                      corner.get(), table.get(),
                                      scales.get(), with_offsets ? offsets.get() : nullptr,
                                      rows,         columns,
                                      levels,       uniform};
  Need(any4::Compensate(block, {codes.get(), errors.get()}, nullptr), "the launch");
  const std::vector<uint8_t> found = codes.Download();
  const std::vector<float> left = errors.Download();
  for (size_t i = 0; i < found.size(); ++i) {
    if (found[i] < levels && std::isfinite(left[i])) continue;
    std::printf("%d columns, %ld rows, %d levels: code %d, error %f\n", columns, long(rows), levels, found[i], left[i]);
    std::exit(1);
  }
}

}  // namespace

int main() {
  int cases = 0;
  for (const bool uniform : {false, true}) {
    for (const bool offsets : {false, true}) {
      for (const int levels : {2, 16, 256}) {
        for (const int columns : {1, 7, 48, any4::kMostColumns}) {
          for (const int64_t rows : {1, 5, 32, 100}) Compensate(columns, rows, levels, offsets, uniform), ++cases;
        }
      }
    }
  }
  std::printf("%d cases\n", cases);
}
