// Runs the CUDA products of all widths, group sizes and numbers of rows, of stacks and of several matrices, in buffers
// that end where the arrays end, and sees that every result is written; test_cuda_sanitizers.py runs it under
// compute-sanitizer. Prints the number of cases; fails at the first wrong one.
#include <algorithm>
#include <memory>

#include "device.h"
#include "lut_product.h"

namespace {

using any4::LutWeight;
using any4::Type;

std::vector<uint8_t> AnyBytes(int64_t count) {
  std::vector<uint8_t> bytes(count);
  for (auto& b : bytes) b = static_cast<uint8_t>(std::rand());
  return bytes;
}

// From 1 to 2, as bfloat16 or as float16.
std::vector<uint16_t> AnyFloats(int64_t count) {
  std::vector<uint16_t> values(count);
  for (auto& v : values) v = static_cast<uint16_t>(0x3F80 | (std::rand() & 0x3F));
  return values;
}

struct Case {
  int bits;
  int64_t group_size, n, k;
  int m;
  bool offsets, own_tables;
  Type type;
  int stack = 1, together = 1;
};

struct Weight {
  int64_t groups, width, tables;
  Device<uint8_t> codes, high;
  Device<uint16_t> lut, scales, offsets;
  Device<int32_t> index;

  explicit Weight(const Case& c)
      : groups(c.group_size >= c.k ? 1 : (c.k + c.group_size - 1) / c.group_size),
        width(c.bits == 3 ? 2 : c.bits),
        tables(c.own_tables ? c.n : 1),
        codes(AnyBytes(c.stack * c.n * c.k * width / 8)),
        high(AnyBytes(c.bits == 3 ? c.stack * c.n * c.k / 8 : 0)),
        lut(AnyFloats(c.stack * tables << c.bits)),
        scales(AnyFloats(c.stack * c.n * groups)),
        offsets(AnyFloats(c.offsets ? c.stack * c.n * groups : 0)),
        index(std::vector<int32_t>{c.stack - 1}) {}

  LutWeight Get(const Case& c) const {
    LutWeight w{};
    w.codes = codes.get();
    w.high = c.bits == 3 ? high.get() : nullptr;
    w.lut = lut.get();
    w.scales = scales.get();
    w.offsets = c.offsets ? offsets.get() : nullptr;
    w.index = c.stack > 1 ? index.get() : nullptr;
    w.stack = c.stack, w.n = c.n, w.k = c.k, w.groups = groups;
    w.lut_stride = c.own_tables ? int64_t{1} << c.bits : 0;
    w.lut_type = c.type;
    w.scale_type = w.offset_type = Type::kBfloat16;
    return w;
  }
};

// Whether no value is what the memory was filled with.
bool IsWritten(const Device<uint16_t>& array) {
  const auto values = array.Download();
  return std::find(values.begin(), values.end(), 0xFFFF) == values.end();
}

int cases = 0;

void Check(bool right, const Case& c, const char* what) {
  ++cases;
  if (right) return;
  std::printf("%s: bits %d, groups of %ld, %ld x %ld, m %d\n", what, c.bits, static_cast<long>(c.group_size),
              static_cast<long>(c.n), static_cast<long>(c.k), c.m);
  std::exit(1);
}

void Multiply(const Case& c) {
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
  Need(any4::LutProducts(given.data(), ys.data(), c.together, c.bits, c.group_size, x.get(), c.m, c.type, nullptr),
       "the launch");
  for (const auto& y : results) Check(IsWritten(*y), c, "a product isn't written");
}

void Dequantize(const Case& c) {
  const Weight w(c);
  const Device<uint16_t> dense(c.n * c.k);
  Need(any4::LutDequantize(w.Get(c), c.bits, c.group_size, dense.get(), c.type, nullptr), "the launch");
  Check(IsWritten(dense), c, "W isn't written");
}

}  // namespace

int main() {
  for (const bool offsets : {true, false}) {
    for (const Type type : {Type::kBfloat16, Type::kFloat16}) {
      // Shapes of the kernels for most models, with few blocks and with many.
      for (const int m : {1, 5, 8, 13, 16, 31, 40, 64, 70, 130, 300}) {
        Multiply({4, 128, 32, 1280, m, offsets, true, type});
        Multiply({4, 128, 256, 512, m, offsets, true, type, 2, 2});
        if (m <= 64) Multiply({4, 128, 8192, 256, m, offsets, false, type});
      }
      // Tiles enough for the instances of Hopper's kernel for many rows that take 128 rows of W at a time.
      for (const int m : {128, 250}) Multiply({4, 128, 17000, 96, m, offsets, true, type});
      // Few tiles and many inputs, so that the parts of K have blocks of their own; the last step of 4128 is half full.
      for (const int m : {40, 64, 100, 128, 256, 500}) {
        Multiply({4, 128, 72, 4128, m, offsets, true, type, 2});
        if (offsets) Multiply({4, m == 64 ? 32 : 256, 136, 4128, m, offsets, true, type});
      }
      for (const int64_t group_size : {32, 64, 256, 100000}) {
        for (const int m : {1, 8, 48, 200}) Multiply({4, group_size, 128, 2048, m, offsets, true, type, 1, 3});
      }
      for (const int bits : {2, 3, 4, 8}) {
        for (const int64_t group_size : {16, 32, 64, 128, 256, 100000}) {
          for (const int m : {1, 3, 9}) Multiply({bits, group_size, 37, 352, m, offsets, m == 3, type});
        }
        Multiply({bits, 128, 64, 512, 2, offsets, true, type, 3, 2});
        Dequantize({bits, 64, 37, 352, 1, offsets, true, type});
        Dequantize({bits, 128, 16, 4096, 1, offsets, false, type, 2});
      }
    }
  }
  for (const int m : {64, 512}) {
    for (const int64_t k : {4096, 14336}) Multiply({4, 128, 4096, k, m, true, true, Type::kBfloat16});
  }
  std::printf("%d cases\n", cases);
}
