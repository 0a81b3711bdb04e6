// AVX-512 (F, BW, VL, DQ): a table of 16 floats is one register, and one permute looks up 16 codes.
#include "lut_binary_kernel.h"
#include "lut_kernel.h"
#include "lut_turned.h"

#if defined(__AVX512F__)

#include <immintrin.h>

namespace any4 {
namespace avx512 {

#include "lut_kernel_inl.h"

#include "lut_binary_kernel_inl.h"

struct Vector {
  using Float = __m512;
  using Int = __m512i;
  static constexpr bool kUnrolled = true;
  static constexpr int kLanes = 16;
  // With 4 decoded rows these are 24 sums, 4 weights and a value: 29 of the 32 registers.
  static constexpr int kTileRows = 6;
  static constexpr int kTableInputs = 4;

  static Float Zero() { return _mm512_setzero_ps(); }
  static Float Broadcast(float value) { return _mm512_set1_ps(value); }
  static Float Load(const float* from) { return _mm512_loadu_ps(from); }
  // The first `count` floats, then zeros; `count` may exceed the number of lanes.
  static Float LoadFirst(const float* from, int64_t count) {
    return count >= kLanes ? Load(from) : _mm512_maskz_loadu_ps(static_cast<__mmask16>((1 << count) - 1), from);
  }
  static Float Load(const uint16_t* bf16) {
    return Widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(bf16)));
  }
  static Float LoadFirst(const uint16_t* bf16, int64_t count) {
    if (count >= kLanes) return Load(bf16);
    return Widen(_mm256_maskz_loadu_epi16(static_cast<__mmask16>((1 << count) - 1), bf16));
  }
  static Float Widen(__m256i bf16) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16));
  }
  static void Store(float* to, Float value) { _mm512_storeu_ps(to, value); }
  static Float Add(Float a, Float b) { return _mm512_add_ps(a, b); }
  static Float Multiply(Float a, Float b) { return _mm512_mul_ps(a, b); }
  static Float Fma(Float a, Float b, Float c) { return _mm512_fmadd_ps(a, b, c); }
  static float Sum(Float a) { return _mm512_reduce_add_ps(a); }
  template <class T>
  static Float Pick(const T* from, const int32_t* lanes) {
    return _mm512_permutexvar_ps(_mm512_loadu_si512(lanes), Load(from));
  }

  static Int LoadWords(const uint8_t* from) { return _mm512_loadu_si512(from); }
  static void StoreWords(uint8_t* to, Int value) { _mm512_storeu_si512(to, value); }
  // columns[i], lane r: the word i after byte `at` of rows[r].
  static void Turn(const uint8_t* const* rows, int64_t at, Int* columns) {
    const auto part = [&](int row) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + at)); };
    // Each quarter of a register gets one of rows i, i + 4, i + 8, i + 12, and within quarters four rows are turned.
    const auto four = [&](int i) {
      Int all = _mm512_inserti32x4(_mm512_castsi128_si512(part(i)), part(i + 4), 1);
      all = _mm512_inserti32x4(all, part(i + 8), 2);
      return _mm512_inserti32x4(all, part(i + 12), 3);
    };
    const Int row[4] = {four(0), four(1), four(2), four(3)};
    const Int low[2] = {_mm512_unpacklo_epi32(row[0], row[1]), _mm512_unpacklo_epi32(row[2], row[3])};
    const Int high[2] = {_mm512_unpackhi_epi32(row[0], row[1]), _mm512_unpackhi_epi32(row[2], row[3])};
    columns[0] = _mm512_unpacklo_epi64(low[0], low[1]);
    columns[1] = _mm512_unpackhi_epi64(low[0], low[1]);
    columns[2] = _mm512_unpacklo_epi64(high[0], high[1]);
    columns[3] = _mm512_unpackhi_epi64(high[0], high[1]);
  }
  static Int LoadHalves(const uint8_t* from) {
    return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  }
  static Int LoadBytes(const uint8_t* from) {
    return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  template <class Count>
  static Int ShiftLeft(Int a, Count count) {
    return _mm512_slli_epi32(a, count);
  }
  template <class Count>
  static Int ShiftRight(Int a, Count count) {
    return count == 0 ? a : _mm512_srli_epi32(a, count);
  }
  // Bits of `a` where the mask has ones, of `b` elsewhere.
  template <int kMask>
  static Int Select(Int a, Int b) {
    return _mm512_ternarylogic_epi32(_mm512_set1_epi32(kMask), a, b, 0xca);
  }

  // Permutes ignore the bits above an index.
  template <int kBits>
  struct Table {
    static constexpr int kRegisters = kBits <= 4 ? 1 : (1 << kBits) / 16;
    __m512 part[kRegisters];

    explicit Table(const float* from) {
      for (int i = 0; i < kRegisters; ++i) part[i] = _mm512_loadu_ps(from + 16 * i);
    }
    Float At(Int index) const {
      if constexpr (kBits <= 4) {
        return _mm512_permutexvar_ps(index, part[0]);
      } else if constexpr (kBits == 5) {
        return _mm512_permutex2var_ps(part[0], index, part[1]);
      } else {
        const __mmask16 upper = _mm512_test_epi32_mask(index, _mm512_set1_epi32(32));
        return _mm512_mask_blend_ps(upper, _mm512_permutex2var_ps(part[0], index, part[1]),
                                    _mm512_permutex2var_ps(part[2], index, part[3]));
      }
    }
  };
};

// 256 floats would fill half of the register file. A table of consecutive integers is computed; others are gathered
// from memory.
template <>
struct Vector::Table<8> {
  const float* table;
  bool integers;
  __m512 bias;

  explicit Table(const float* from) : table(from), integers(true), bias(_mm512_set1_ps(kShift - from[0])) {
    for (int i = 0; i < 256 && integers; i += 16) {
      const __m512 computed = Integers(_mm512_add_epi32(_mm512_set1_epi32(i), Lanes()));
      integers = _mm512_cmpeq_ps_mask(computed, _mm512_loadu_ps(from + i)) == 0xffff;
    }
  }
  // 2^23: putting a code into the low bits of its mantissa adds the code. That takes two instructions, where a mask, a
  // conversion and an addition take three.
  static constexpr float kShift = 8388608;
  static Int Lanes() { return _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0); }
  Float Integers(Int index) const {
    // (index & 255) | bits of kShift.
    const Int bits = _mm512_ternarylogic_epi32(index, _mm512_set1_epi32(255), _mm512_set1_epi32(0x4b000000), 0xea);
    return _mm512_sub_ps(_mm512_castsi512_ps(bits), bias);
  }
  Float At(Int index) const {
    if (integers) return Integers(index);
    return _mm512_i32gather_ps(_mm512_and_si512(index, _mm512_set1_epi32(255)), table, 4);
  }
};

}  // namespace avx512

const LutKernel* Avx512Kernel(int bits) { return avx512::KernelOf<avx512::Vector>(bits); }
const BinaryKernel* Avx512BinaryKernel() { return &avx512::Binary<avx512::Vector>::kKernel; }
const TurnedKernel* Avx512Turned() { return &avx512::TurnedOf<avx512::Vector>::kKernel; }

}  // namespace any4

#else

namespace any4 {
const LutKernel* Avx512Kernel(int) { return nullptr; }
const BinaryKernel* Avx512BinaryKernel() { return nullptr; }
const TurnedKernel* Avx512Turned() { return nullptr; }
}  // namespace any4

#endif
