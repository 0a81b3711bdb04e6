// Numbers of packed codes that index a table, a token at a time; each instruction set's kvquant_inl.h includes this one.
#pragma once

#include "attention_inl.h"

namespace any4 {
namespace {

// Codes of one token and head, a byte each, in the order of channels; `size` is a multiple of 8. Eight at a time, codes move
// apart by halves.
inline void Unpack(int64_t bits, const uint8_t* low, const uint8_t* high, int64_t size, uint8_t* codes) {
  if (bits == 4) {
    for (int64_t i = 0; i < size / 8; ++i) {
      uint32_t packed;
      __builtin_memcpy(&packed, low + i * 4, sizeof packed);
      uint64_t wide = packed;
      wide = (wide | wide << 16) & 0x0000FFFF0000FFFF;
      wide = (wide | wide << 8) & 0x00FF00FF00FF00FF;
      wide = (wide | wide << 4) & 0x0F0F0F0F0F0F0F0F;
      __builtin_memcpy(codes + i * 8, &wide, sizeof wide);
    }
    return;
  }
  for (int64_t i = 0; i < size / 8; ++i) {
    uint16_t packed;
    __builtin_memcpy(&packed, low + i * 2, sizeof packed);
    uint64_t wide = packed;
    wide = (wide | wide << 24) & 0x000000FF000000FF;
    wide = (wide | wide << 12) & 0x000F000F000F000F;
    wide = (wide | wide << 6) & 0x0303030303030303;
    __builtin_memcpy(codes + i * 8, &wide, sizeof wide);
  }
  if (high == nullptr) return;
  for (int64_t i = 0; i < size / 8; ++i) {
    // Each byte of the product keeps one bit; with 0x7F more, any that isn't zero reaches the highest.
    const uint64_t one = (uint64_t{high[i]} * 0x0101010101010101 & 0x8040201008040201) + 0x7F7F7F7F7F7F7F7F;
    uint64_t wide;
    __builtin_memcpy(&wide, codes + i * 8, sizeof wide);
    wide |= (one >> 7 & 0x0101010101010101) << 2;
    __builtin_memcpy(codes + i * 8, &wide, sizeof wide);
  }
}

// A table of up to 16 floats.
class Levels {
 public:
  Levels(const float* levels, int64_t count) : table_{} {
    for (int64_t i = 0; i < count; ++i) table_[i] = levels[i];
  }

  // Those of the next kRegister codes.
  FloatRegister At(const uint8_t* codes) const {
#if defined(__AVX512F__)
    const __m512i of = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes)));
    return (FloatRegister)_mm512_permutexvar_ps(of, _mm512_loadu_ps(table_));
#elif defined(__AVX2__)
    const __m256i of = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes)));
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table_), of);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table_ + 8), of);
    return (FloatRegister)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(of, 28)));
#else
    FloatRegister found;
    for (int j = 0; j < kRegister; ++j) found[j] = table_[codes[j]];
    return found;
#endif
  }

 private:
  float table_[16];
};

// x [size] rotated by cos and sin [size / 2] of angles, or back.
inline void Rotate(float* x, const float* cos, const float* sin, int64_t size, bool back) {
  const int64_t half = size / 2;
  const float sign = back ? -1.0f : 1.0f;
  for (int64_t c = 0; c < half; c += kRegister) {
    const FloatRegister a = LoadRegister(x + c), b = LoadRegister(x + half + c), cosine = LoadRegister(cos + c),
                        sine = sign * LoadRegister(sin + c);
    StoreRegister(x + c, a * cosine - b * sine);
    StoreRegister(x + half + c, b * cosine + a * sine);
  }
}

}  // namespace
}  // namespace any4
