// AVX2 and FMA: a permute looks up 8 codes among 8 floats, so a table of 16 takes two permutes and a blend. Larger
// tables are gathered from memory.
#include "lut_binary_kernel.h"
#include "lut_kernel.h"
#include "lut_turned.h"

#if defined(__AVX2__)

#include <immintrin.h>

namespace any4 {
namespace avx2 {

#include "lut_kernel_inl.h"

#include "lut_binary_kernel_inl.h"

struct Vector {
  using Float = __m256;
  using Int = __m256i;
  static constexpr bool kUnrolled = true;
  static constexpr int kLanes = 8;
  // With 4 decoded rows these are 8 sums, 4 weights and a value: 13 of the 16 registers.
  static constexpr int kTileRows = 2;
  static constexpr int kTableInputs = 3;

  static Float Zero() { return _mm256_setzero_ps(); }
  static Float Broadcast(float value) { return _mm256_set1_ps(value); }
  static Float Load(const float* from) { return _mm256_loadu_ps(from); }
  // The first `count` floats, then zeros; `count` may exceed the number of lanes.
  static Float LoadFirst(const float* from, int64_t count) {
    const Int lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const Int wanted = _mm256_cmpgt_epi32(_mm256_set1_epi32(count < kLanes ? static_cast<int>(count) : kLanes), lanes);
    return _mm256_maskload_ps(from, wanted);
  }
  static Float Load(const uint16_t* bf16) { return Widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(bf16))); }
  static Float LoadFirst(const uint16_t* bf16, int64_t count) {
    if (count >= kLanes) return Load(bf16);
    uint16_t first[kLanes] = {};
    for (int64_t i = 0; i < count; ++i) first[i] = bf16[i];
    return Load(first);
  }
  static Float Widen(__m128i bf16) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16));
  }
  static void Store(float* to, Float value) { _mm256_storeu_ps(to, value); }
  static Float Add(Float a, Float b) { return _mm256_add_ps(a, b); }
  static Float Multiply(Float a, Float b) { return _mm256_mul_ps(a, b); }
  static Float Fma(Float a, Float b, Float c) { return _mm256_fmadd_ps(a, b, c); }
  static float Sum(Float a) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  template <class T>
  static Float Pick(const T* from, const int32_t* lanes) {
    return _mm256_permutevar8x32_ps(Load(from), LoadWords(reinterpret_cast<const uint8_t*>(lanes)));
  }

  static Int LoadWords(const uint8_t* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
  static void StoreWords(uint8_t* to, Int value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value); }
  // columns[i], lane r: the word i after byte `at` of rows[r].
  static void Turn(const uint8_t* const* rows, int64_t at, Int* columns) {
    const auto part = [&](int row) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(rows[row] + at)); };
    // Each half of a register gets one of rows i and i + 4, and within halves four rows are turned.
    const auto two = [&](int i) { return _mm256_inserti128_si256(_mm256_castsi128_si256(part(i)), part(i + 4), 1); };
    const Int row[4] = {two(0), two(1), two(2), two(3)};
    const Int low[2] = {_mm256_unpacklo_epi32(row[0], row[1]), _mm256_unpacklo_epi32(row[2], row[3])};
    const Int high[2] = {_mm256_unpackhi_epi32(row[0], row[1]), _mm256_unpackhi_epi32(row[2], row[3])};
    columns[0] = _mm256_unpacklo_epi64(low[0], low[1]);
    columns[1] = _mm256_unpackhi_epi64(low[0], low[1]);
    columns[2] = _mm256_unpacklo_epi64(high[0], high[1]);
    columns[3] = _mm256_unpackhi_epi64(high[0], high[1]);
  }
  static Int LoadHalves(const uint8_t* from) {
    return _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  }
  static Int LoadBytes(const uint8_t* from) {
    return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
  }
  template <class Count>
  static Int ShiftLeft(Int a, Count count) {
    return _mm256_slli_epi32(a, count);
  }
  template <class Count>
  static Int ShiftRight(Int a, Count count) {
    return count == 0 ? a : _mm256_srli_epi32(a, count);
  }
  // Bits of `a` where the mask has ones, of `b` elsewhere.
  template <int kMask>
  static Int Select(Int a, Int b) {
    const Int mask = _mm256_set1_epi32(kMask);
    return _mm256_or_si256(_mm256_and_si256(mask, a), _mm256_andnot_si256(mask, b));
  }

  template <int kBits>
  struct Table {
    const float* table;
    __m256 low, high;

    explicit Table(const float* from) : table(from), low(_mm256_loadu_ps(from)), high(_mm256_loadu_ps(from + 8)) {}
    Float At(Int index) const {
      if constexpr (kBits <= 3) {
        return _mm256_permutevar8x32_ps(low, index);
      } else if constexpr (kBits == 4) {
        // The blend selects by the sign bit.
        const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
        return _mm256_blendv_ps(_mm256_permutevar8x32_ps(low, index), _mm256_permutevar8x32_ps(high, index), upper);
      } else {
        return _mm256_i32gather_ps(table, _mm256_and_si256(index, _mm256_set1_epi32((1 << kBits) - 1)), 4);
      }
    }
  };
};

}  // namespace avx2

const LutKernel* Avx2Kernel(int bits) { return avx2::KernelOf<avx2::Vector>(bits); }
const BinaryKernel* Avx2BinaryKernel() { return &avx2::Binary<avx2::Vector>::kKernel; }
const TurnedKernel* Avx2Turned() { return &avx2::TurnedOf<avx2::Vector>::kKernel; }

}  // namespace any4

#else

namespace any4 {
const LutKernel* Avx2Kernel(int) { return nullptr; }
const BinaryKernel* Avx2BinaryKernel() { return nullptr; }
const TurnedKernel* Avx2Turned() { return nullptr; }
}  // namespace any4

#endif
