// Runs the CUDA products of binary planes, of few entries, and of coded scales beside entries, with few blocks and with
// many, in buffers that end where the arrays end, and sees that every result is written; test_cuda_sanitizers.py runs it
// under compute-sanitizer. Prints the number of cases; fails at the first wrong one.
#include <algorithm>
#include <memory>

#include "binary_product.h"
#include "coded_product.h"
#include "device.h"

namespace {

using any4::Type;

int cases = 0;

template <typename T>
std::vector<T> Any(int64_t count, int lowest, int values) {
  std::vector<T> drawn(count);
  for (auto& v : drawn) v = static_cast<T>(lowest + std::rand() % values);
  return drawn;
}

// From 1 to 2, as bfloat16.
std::vector<uint16_t> AnyFloats(int64_t count) { return Any<uint16_t>(count, 0x3F80, 0x40); }
std::vector<uint8_t> AnyBytes(int64_t count) { return Any<uint8_t>(count, 0, 256); }

void See(const Device<uint16_t>& y, const char* what, int64_t n, int64_t k, int64_t m) {
  const auto values = y.Download();
  ++cases;
  if (std::find(values.begin(), values.end(), 0xFFFF) == values.end()) return;
  std::printf("%s isn't written: %ld x %ld, m %ld\n", what, static_cast<long>(n), static_cast<long>(k),
              static_cast<long>(m));
  std::exit(1);
}

// A fiftieth of the columns in each row, in blocks of n / blocks rows.
struct Few {
  Device<int32_t> ends;
  Device<uint16_t> columns, values;
  any4::Entries entries;

  static std::vector<int32_t> Ends(int64_t n, int blocks, int a_row) {
    std::vector<int32_t> ends(n);
    for (int64_t i = 0; i < n; ++i) ends[i] = static_cast<int32_t>(i % (n / blocks) + 1) * a_row;
    return ends;
  }

  Few(int64_t n, int64_t k, int blocks, int a_row)
      : ends(Ends(n, blocks, a_row)),
        columns(Any<uint16_t>(n * a_row, 0, static_cast<int>(k))),
        values(AnyFloats(n * a_row)),
        entries{ends.get(), columns.get(), values.get(), n, k, static_cast<int>(n / blocks),
                static_cast<int>(n / blocks) * a_row, true, false, false} {}
};

void Sparse(int64_t n, int64_t k, int64_t m) {
  const Few few(n, k, 1, 5);
  const Device<uint16_t> x(AnyFloats(m * k)), y(m * n);
  Need(any4::SparseProduct(few.entries, x.get(), m, Type::kBfloat16, y.get(), nullptr), "the launch");
  See(y, "a product with entries", n, k, m);
}

void Binary(int count, int64_t n, int64_t k, int group_shift, int64_t m, bool offsets) {
  const int64_t group = int64_t{any4::kBinaryTile} << group_shift, groups = (k + group - 1) / group;
  std::vector<std::unique_ptr<Device<uint8_t>>> codes;
  std::vector<std::unique_ptr<Device<uint16_t>>> floats;
  const auto some = [&](int64_t size) {
    floats.push_back(std::make_unique<Device<uint16_t>>(AnyFloats(size)));
    return floats.back()->get();
  };
  any4::BinaryWeight w{};
  w.count = count, w.n = n, w.k = k, w.groups = groups, w.group_shift = group_shift;
  for (int p = 0; p < count; ++p) {
    codes.push_back(std::make_unique<Device<uint8_t>>(AnyBytes(n * k / 8)));
    w.planes[p] = {codes.back()->get(), some(p % 2 ? 2 * n : 2), some(n * groups), offsets ? some(n * groups) : nullptr,
                   p % 2 == 1};
  }
  const Device<uint16_t> x(AnyFloats(m * k)), y(m * n);
  Need(any4::BinaryProduct(w, x.get(), m, Type::kBfloat16, y.get(), nullptr), "the launch");
  See(y, "a product with planes", n, k, m);
}

struct Scales {
  Device<uint8_t> low, high;
  Device<uint16_t> lut, scales, offsets;

  Scales(int64_t n, int64_t groups)
      : low(AnyBytes(groups * n / 4)),
        high(AnyBytes(groups * n / 8)),
        lut(AnyFloats(8)),
        scales(AnyFloats(groups * n / any4::kCodedRun)),
        offsets(AnyFloats(groups * n / any4::kCodedRun)) {}

  any4::CodedScales Get() const { return {low.get(), high.get(), lut.get(), scales.get(), offsets.get()}; }
};

void Coded(int64_t n, int64_t k, int64_t m, bool ramp, bool offsets, bool entries) {
  const Device<uint8_t> low(AnyBytes(n * k / 4)), high(AnyBytes(n * k / 8));
  const Device<uint16_t> lut(AnyFloats(ramp ? 8 : 8 * n));
  const Scales of_scales(n, k / any4::kCodedGroup), of_offsets(n, k / any4::kCodedGroup);
  const Few few(n, k, 2, 3);
  any4::CodedWeight w{};
  w.codes.codes = low.get(), w.codes.high = high.get(), w.codes.lut = lut.get();
  w.codes.n = n, w.codes.k = k, w.codes.lut_stride = ramp ? 0 : 8, w.codes.lut_type = Type::kBfloat16;
  w.ramp = ramp;
  w.scales = of_scales.Get();
  if (offsets) w.offsets = of_offsets.Get();
  if (entries) w.entries = few.entries;
  const Device<uint16_t> x(AnyFloats(m * k)), y(m * n);
  Need(any4::CodedProduct(w, x.get(), m, y.get(), nullptr), "the launch");
  See(y, "a product with coded scales", n, k, m);
}

}  // namespace

int main() {
  for (const int64_t m : {1, 3, 8, 9}) {
    Sparse(33, 100, m);
    Sparse(4096, 256, m);
  }
  for (int count = 1; count <= 4; ++count) {
    Binary(count, 70, 384, 0, count, count % 2 == 0);
    Binary(count, 5, 4352, 1, 8, count % 2 == 1);
    Binary(count, 4096, 128, 5, 1, false);
  }
  for (const bool ramp : {true, false}) {
    Coded(96, 256, 1, ramp, true, true);
    Coded(9600, 128, 2, ramp, false, true);
    Coded(32, 4224, 1, ramp, true, false);
  }
  std::printf("%d cases\n", cases);
}
