// Plain C++ for every processor; compilers turn the loops over lanes into vectors of whatever length there is.
#include "lut_binary_kernel.h"
#include "lut_kernel.h"
#include "lut_turned.h"

namespace any4 {
namespace portable {

#include "lut_kernel_inl.h"

#include "lut_binary_kernel_inl.h"

struct Vector {
  static constexpr int kLanes = 8;
  static constexpr bool kUnrolled = false;
  static constexpr int kTileRows = 2;
  static constexpr int kTableInputs = 8;

  struct Float {
    float lane[kLanes];
  };
  struct Int {
    uint32_t lane[kLanes];
  };

  template <class Lanes, class Of>
  static Lanes Each(const Of& of) {
    Lanes result;
    for (int i = 0; i < kLanes; ++i) result.lane[i] = of(i);
    return result;
  }

  static Float Zero() { return Broadcast(0); }
  static Float Broadcast(float value) {
    return Each<Float>([&](int) { return value; });
  }
  static Float Load(const float* from) {
    return Each<Float>([&](int i) { return from[i]; });
  }
  // The first `count` floats, then zeros; `count` may exceed the number of lanes.
  template <class T>
  static Float LoadFirst(const T* from, int64_t count) {
    return Each<Float>([&](int i) { return i < count ? ToFloat(from[i]) : 0; });
  }
  static void Store(float* to, Float value) {
    for (int i = 0; i < kLanes; ++i) to[i] = value.lane[i];
  }
  static Float Add(Float a, Float b) {
    return Each<Float>([&](int i) { return a.lane[i] + b.lane[i]; });
  }
  static Float Multiply(Float a, Float b) {
    return Each<Float>([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static Float Fma(Float a, Float b, Float c) {
    return Each<Float>([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
  }
  static float Sum(Float a) {
    float total = 0;
    for (float value : a.lane) total += value;
    return total;
  }
  template <class T>
  static Float Pick(const T* from, const int32_t* lanes) {
    return Each<Float>([&](int i) { return ToFloat(from[lanes[i]]); });
  }

  // Byte by byte, so that the first code is in the lowest bits whatever the machine's byte order.
  static Int LoadWords(const uint8_t* from) {
    return Each<Int>([&](int i) {
      const uint8_t* b = from + 4 * i;
      return uint32_t{b[0]} | uint32_t{b[1]} << 8 | uint32_t{b[2]} << 16 | uint32_t{b[3]} << 24;
    });
  }
  static void StoreWords(uint8_t* to, Int value) { __builtin_memcpy(to, value.lane, sizeof value.lane); }
  // columns[i], lane r: the word i after byte `at` of rows[r], its bytes in their order.
  static void Turn(const uint8_t* const* rows, int64_t at, Int* columns) {
    for (int i = 0; i < 4; ++i) {
      for (int r = 0; r < kLanes; ++r) __builtin_memcpy(columns[i].lane + r, rows[r] + at + 4 * i, 4);
    }
  }
  static Int LoadHalves(const uint8_t* from) {
    return Each<Int>([&](int i) { return uint32_t{from[2 * i]} | uint32_t{from[2 * i + 1]} << 8; });
  }
  static Int LoadBytes(const uint8_t* from) {
    return Each<Int>([&](int i) { return uint32_t{from[i]}; });
  }
  static Int ShiftLeft(Int a, int count) {
    return Each<Int>([&](int i) { return a.lane[i] << count; });
  }
  static Int ShiftRight(Int a, int count) {
    return Each<Int>([&](int i) { return a.lane[i] >> count; });
  }
  // Bits of `a` where the mask has ones, of `b` elsewhere.
  template <int kMask>
  static Int Select(Int a, Int b) {
    return Each<Int>([&](int i) { return (a.lane[i] & kMask) | (b.lane[i] & ~uint32_t{kMask}); });
  }

  template <int kBits>
  struct Table {
    const float* table;

    explicit Table(const float* from) : table(from) {}
    Float At(Int index) const {
      return Each<Float>([&](int i) { return table[index.lane[i] & ((1 << kBits) - 1)]; });
    }
  };
};

}  // namespace portable

const LutKernel* PortableKernel(int bits) { return portable::KernelOf<portable::Vector>(bits); }
const BinaryKernel* PortableBinaryKernel() { return &portable::Binary<portable::Vector>::kKernel; }
const TurnedKernel* PortableTurned() { return &portable::TurnedOf<portable::Vector>::kKernel; }

}  // namespace any4
