// Plain C++ for every processor; compilers turn the loops over lanes into vectors of whatever length there is.
#include "byte_kernel.h"

namespace any4 {
namespace byte_portable {

#include "byte_kernel_inl.h"

struct Vector {
  static constexpr int kLanes = 8;
  static constexpr bool kUnsigned = false, kReadsStored = false;
  static constexpr int kRowsOfOne = 1, kRows = 1, kInputs = 2, kTokenInputs = 2;
  using TokenWeight = int8_t;
  using TokenQ = int8_t;

  struct Bytes {
    int8_t byte[4 * kLanes];
  };
  struct Ints {
    int32_t lane[kLanes];
  };
  struct Floats {
    float lane[kLanes];
  };

  template <class Lanes, class Of>
  static Lanes Each(const Of& of) {
    Lanes result;
    for (int i = 0; i < kLanes; ++i) result.lane[i] = of(i);
    return result;
  }
  template <class Of>
  static Bytes EachByte(const Of& of) {
    Bytes result;
    for (int i = 0; i < 4 * kLanes; ++i) result.byte[i] = static_cast<int8_t>(of(i));
    return result;
  }

  static Bytes Load(const void* from) {
    Bytes result;
    __builtin_memcpy(result.byte, from, sizeof result.byte);
    return result;
  }
  static void StoreBytes(void* to, const Bytes& value) { __builtin_memcpy(to, value.byte, sizeof value.byte); }
  template <class Lanes>
  static const Lanes& Hold(const Lanes& value) {
    return value;
  }
  static Bytes Ones() {
    return EachByte([](int) { return 1; });
  }
  static Bytes Low(const Bytes& codes) {
    return EachByte([&](int i) { return codes.byte[i] & 15; });
  }
  static Bytes High(const Bytes& codes) {
    return EachByte([&](int i) { return (codes.byte[i] >> 4) & 15; });
  }
  static void Whole(const uint8_t* codes, Bytes* low, Bytes* high) {
    *low = EachByte([&](int i) { return codes[i / 16 * 32 + i % 16] ^ 128; });
    *high = EachByte([&](int i) { return codes[i / 16 * 32 + i % 16 + 16] ^ 128; });
  }
  static Ints Zero() {
    return Each<Ints>([](int) { return 0; });
  }
  static Ints LoadInts(const int32_t* from) {
    return Each<Ints>([&](int i) { return from[i]; });
  }
  static void StoreInts(int32_t* to, const Ints& value) { __builtin_memcpy(to, value.lane, sizeof value.lane); }
  static Ints Dot(const Ints& sum, const Bytes& weights, const Bytes& q) {
    return Each<Ints>([&](int i) {
      int32_t total = sum.lane[i];
      for (int j = 4 * i; j < 4 * i + 4; ++j) total += weights.byte[j] * q.byte[j];
      return total;
    });
  }
  static Bytes LoadCodes(const uint8_t* codes) {
    return EachByte([&](int i) { return codes[i] ^ 128; });
  }
  static Ints TokenDot(const Ints& sum, const Bytes& weights, const Bytes& q) { return Dot(sum, weights, q); }
  static Floats ZeroFloats() { return Broadcast(0); }
  static Floats Broadcast(float value) {
    return Each<Floats>([&](int) { return value; });
  }
  static Floats LoadFloats(const float* from) {
    return Each<Floats>([&](int i) { return from[i]; });
  }
  static Floats LoadFirst(const float* from, int64_t count) {
    return Each<Floats>([&](int i) { return i < count ? from[i] : 0; });
  }
  static Floats Pick(const float* from, const int32_t* lanes) {
    return Each<Floats>([&](int i) { return from[lanes[i]]; });
  }
  static Floats Multiply(const Floats& a, const Floats& b) {
    return Each<Floats>([&](int i) { return a.lane[i] * b.lane[i]; });
  }
  static Floats Fma(const Floats& a, const Floats& b, const Floats& c) {
    return Each<Floats>([&](int i) { return a.lane[i] * b.lane[i] + c.lane[i]; });
  }
  static Floats ToFloats(const Ints& a) {
    return Each<Floats>([&](int i) { return static_cast<float>(a.lane[i]); });
  }
  static Ints Nearest(const Floats& a) {
    return Each<Ints>([&](int i) { return static_cast<int32_t>(__builtin_rintf(a.lane[i])); });
  }
  // The bits of the magnitudes.
  static Ints Magnitude(const Floats& a) {
    return Each<Ints>([&](int i) {
      int32_t bits;
      __builtin_memcpy(&bits, a.lane + i, sizeof bits);
      return bits & 0x7fffffff;
    });
  }
  static Ints Larger(const Ints& a, const Ints& b) {
    return Each<Ints>([&](int i) { return a.lane[i] > b.lane[i] ? a.lane[i] : b.lane[i]; });
  }
  static int32_t Largest(const Ints& a) {
    int32_t largest = 0;
    for (int32_t value : a.lane) largest = value > largest ? value : largest;
    return largest;
  }
  // 32 integers of 8 bits: even and odd ones apart where codes have 4 bits, else the first and the second half.
  template <int kBits>
  static void StoreGroup(const Ints* q, int8_t* low, int8_t* high) {
    for (int i = 0; i < 16; ++i) {
      const int first = kBits == 4 ? 2 * i : i, second = kBits == 4 ? 2 * i + 1 : 16 + i;
      low[i] = static_cast<int8_t>(q[first / kLanes].lane[first % kLanes]);
      high[i] = static_cast<int8_t>(q[second / kLanes].lane[second % kLanes]);
    }
  }
  static float Sum(const Floats& a) {
    float total = 0;
    for (float value : a.lane) total += value;
    return total;
  }

  struct Table {
    const int8_t* values;

    void Set(const int8_t* table) { values = table; }
    Bytes Look(const Bytes& index) const {
      return EachByte([&](int i) { return values[index.byte[i]]; });
    }
  };
};

}  // namespace byte_portable

const ByteKernel* PortableByteKernel() {
  using byte_portable::Vector;
  return byte_portable::ByteKernelOf<Vector>::Get();
}

}  // namespace any4
