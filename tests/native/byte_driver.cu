// Runs the CUDA products of rounded inputs with tables of int8, with few blocks and with many, of stacks and of several
// matrices, in buffers that end where the arrays end, and sees that every result is written;
// test_cuda_sanitizers.py runs it under compute-sanitizer. Prints the number of cases; fails at the first wrong one.
#include <algorithm>
#include <memory>

#include "byte_product.h"
#include "device.h"

namespace {

using any4::Inputs;
using any4::LutWeight;
using any4::Type;

struct Case {
  int64_t group_size, n, k;
  int m;
  bool offsets, own_tables;
  int stack = 1, together = 1;
};

template <typename T>
std::vector<T> Any(int64_t count, int lowest, int values) {
  std::vector<T> drawn(count);
  for (auto& v : drawn) v = static_cast<T>(lowest + std::rand() % values);
  return drawn;
}

// From 1 to 2, as bfloat16.
std::vector<uint16_t> AnyFloats(int64_t count) { return Any<uint16_t>(count, 0x3F80, 0x40); }

struct Weight {
  int64_t groups, tables;
  Device<uint8_t> codes;
  Device<int8_t> lut;
  Device<uint16_t> scales, offsets;
  Device<int32_t> index;

  explicit Weight(const Case& c)
      : groups(c.group_size >= c.k ? 1 : (c.k + c.group_size - 1) / c.group_size),
        tables(c.own_tables ? c.n : 1),
        codes(Any<uint8_t>(c.stack * c.n * c.k / 2, 0, 256)),
        lut(Any<int8_t>(c.stack * tables * 16, -128, 256)),
        scales(AnyFloats(c.stack * c.n * groups)),
        offsets(AnyFloats(c.offsets ? c.stack * c.n * groups : 0)),
        index(std::vector<int32_t>{c.stack - 1}) {}

  LutWeight Get(const Case& c) const {
    LutWeight w{};
    w.codes = codes.get();
    w.lut = lut.get();
    w.scales = scales.get();
    w.offsets = c.offsets ? offsets.get() : nullptr;
    w.index = c.stack > 1 ? index.get() : nullptr;
    w.stack = c.stack, w.n = c.n, w.k = c.k, w.groups = groups;
    w.lut_stride = c.own_tables ? 16 : 0;
    w.lut_type = Type::kInt8;
    w.scale_type = w.offset_type = Type::kBfloat16;
    return w;
  }
};

int cases = 0;

void Multiply(const Case& c, Inputs inputs) {
  std::vector<std::unique_ptr<Weight>> weights;
  std::vector<std::unique_ptr<Device<uint16_t>>> results;
  std::vector<LutWeight> given;
  std::vector<void*> ys;
  for (int i = 0; i < c.together; ++i) {
    weights.push_back(std::make_unique<Weight>(c));
    results.push_back(std::make_unique<Device<uint16_t>>(c.m * c.n));
    given.push_back(weights.back()->Get(c));
    ys.push_back(results.back()->get());
  }
  const Device<uint16_t> x(AnyFloats(c.m * c.k));
  bool right = any4::IsForBytes(given[0], c.group_size);
  Need(any4::ByteProducts(given.data(), ys.data(), c.together, c.group_size, x.get(), c.m, inputs, nullptr),
       "the launch");
  for (const auto& y : results) {
    const auto values = y->Download();
    right = right && std::find(values.begin(), values.end(), 0xFFFF) == values.end();
  }
  ++cases;
  if (right) return;
  std::printf("a product isn't written: groups of %ld, %ld x %ld, m %d\n", static_cast<long>(c.group_size),
              static_cast<long>(c.n), static_cast<long>(c.k), c.m);
  std::exit(1);
}

}  // namespace

int main() {
  for (const Inputs inputs : {Inputs::kBytes, Inputs::kPairs}) {
    for (const bool offsets : {true, false}) {
      for (const int m : {1, 2, 3}) {
        Multiply({128, 32, 1280, m, offsets, true}, inputs);
        Multiply({64, 256, 512, m, offsets, false, 2, 5}, inputs);
        Multiply({100000, 32, 256, m, offsets, true, 3}, inputs);
        Multiply({256, 17024, 256, m, offsets, true}, inputs);
      }
    }
  }
  std::printf("%d cases\n", cases);
}
