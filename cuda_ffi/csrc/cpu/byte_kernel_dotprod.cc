// ARM's NEON with the dot products of bytes that ARMv8.2 added: a table lookup finds 16 weights, one instruction
// multiplies them.
#include "byte_kernel.h"

#if defined(__aarch64__) && defined(__ARM_FEATURE_DOTPROD)

#include <arm_neon.h>

namespace any4 {
namespace byte_dotprod {

#include "byte_kernel_inl.h"

struct Vector {
  using Bytes = int8x16_t;
  using Ints = int32x4_t;
  using Floats = float32x4_t;
  static constexpr int kLanes = 4;
  static constexpr bool kUnsigned = false, kReadsStored = false;
  static constexpr int kRowsOfOne = 4, kRows = 2, kInputs = 4, kTokenInputs = 4;
  using TokenWeight = int8_t;
  using TokenQ = int8_t;

  static Bytes Load(const void* from) { return vld1q_s8(static_cast<const int8_t*>(from)); }
  static void StoreBytes(void* to, Bytes value) { vst1q_s8(static_cast<int8_t*>(to), value); }
  template <class Lanes>
  static Lanes Hold(Lanes value) {
    return value;
  }
  static Bytes Ones() { return vdupq_n_s8(1); }
  static Bytes Low(Bytes codes) { return vandq_s8(codes, vdupq_n_s8(15)); }
  static Bytes High(Bytes codes) { return vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(codes), 4)); }
  static void Whole(const uint8_t* codes, Bytes* low, Bytes* high) {
    *low = veorq_s8(Load(codes), vdupq_n_s8(-128));
    *high = veorq_s8(Load(codes + 16), vdupq_n_s8(-128));
  }
  static Ints Zero() { return vdupq_n_s32(0); }
  static Ints LoadInts(const int32_t* from) { return vld1q_s32(from); }
  static void StoreInts(int32_t* to, Ints value) { vst1q_s32(to, value); }
  static Ints Dot(Ints sum, Bytes weights, Bytes q) { return vdotq_s32(sum, weights, q); }
  static Bytes LoadCodes(const uint8_t* codes) { return veorq_s8(Load(codes), vdupq_n_s8(-128)); }
  static Ints TokenDot(Ints sum, Bytes weights, Bytes q) { return Dot(sum, weights, q); }
  static Floats ZeroFloats() { return vdupq_n_f32(0); }
  static Floats Broadcast(float value) { return vdupq_n_f32(value); }
  static Floats LoadFloats(const float* from) { return vld1q_f32(from); }
  // The first `count` floats, then zeros; `count` may exceed the number of lanes.
  static Floats LoadFirst(const float* from, int64_t count) {
    float first[kLanes] = {};
    for (int64_t i = 0; i < kLanes && i < count; ++i) first[i] = from[i];
    return vld1q_f32(first);
  }
  // A step is one group of inputs.
  static Floats Pick(const float* from, const int32_t* lanes) { return vdupq_n_f32(from[lanes[0]]); }
  static Floats Multiply(Floats a, Floats b) { return vmulq_f32(a, b); }
  static Floats Fma(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }
  static Floats ToFloats(Ints a) { return vcvtq_f32_s32(a); }
  static Ints Nearest(Floats a) { return vcvtnq_s32_f32(a); }
  // The bits of the magnitudes.
  static Ints Magnitude(Floats a) { return vreinterpretq_s32_f32(vabsq_f32(a)); }
  static Ints Larger(Ints a, Ints b) { return vmaxq_s32(a, b); }
  static int32_t Largest(Ints a) { return vmaxvq_s32(a); }
  // 32 integers of 8 bits: even and odd ones apart where codes have 4 bits, else the first and the second half.
  template <int kBits>
  static void StoreGroup(const Ints* q, int8_t* low, int8_t* high) {
    const Bytes first = Narrow(q), second = Narrow(q + 4);
    vst1q_s8(low, kBits == 4 ? vuzp1q_s8(first, second) : first);
    vst1q_s8(high, kBits == 4 ? vuzp2q_s8(first, second) : second);
  }
  static Bytes Narrow(const Ints* q) {
    const int16x8_t first = vcombine_s16(vmovn_s32(q[0]), vmovn_s32(q[1]));
    const int16x8_t second = vcombine_s16(vmovn_s32(q[2]), vmovn_s32(q[3]));
    return vcombine_s8(vmovn_s16(first), vmovn_s16(second));
  }
  static float Sum(Floats a) { return vaddvq_f32(a); }

  struct Table {
    Bytes values;

    void Set(const int8_t* table) { values = vld1q_s8(table); }
    Bytes Look(Bytes index) const { return vqtbl1q_s8(values, vreinterpretq_u8_s8(index)); }
  };
};

}  // namespace byte_dotprod

const ByteKernel* DotProdByteKernel() { return byte_dotprod::ByteKernelOf<byte_dotprod::Vector>::Get(); }

}  // namespace any4

#else

namespace any4 {
const ByteKernel* DotProdByteKernel() { return nullptr; }
}  // namespace any4

#endif
