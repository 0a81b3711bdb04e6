// The entry of a table nearest to each of 16 values.
#pragma once

#include "lanes_inl.h"
#include "refit.h"

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace any4 {
namespace {

// An ascending table of 16 entries, in the registers that finding the nearest one takes. A value halfway between two
// entries takes the lower.
class Nearest {
 public:
  // A table of `count` entries; one of fewer than 16 is filled up with entries that no value takes.
  Nearest(const float* entries, int64_t count) {
    for (int64_t i = 0; i < kMaxEntries; ++i) {
      values_[i] = entries[i < count ? i : count - 1];
      middles_[i] = i + 1 < count ? (entries[i] + entries[i + 1]) / 2 : __builtin_inff();
    }
#if defined(__AVX512F__)
    table_ = _mm512_loadu_ps(values_);
    half_ = _mm512_set1_ps(middles_[7]);
    quarters_ = Every(8, 3);
    eighths_ = Every(4, 1);
    sixteenths_ = Every(2, 0);
#elif defined(__AVX2__)
    half_ = _mm256_set1_ps(middles_[7]);
    quarters_ = Every(middles_, 8, 3);
    eighths_ = Every(middles_, 4, 1);
    sixteenths_ = Every(middles_, 2, 0);
    even_ = Every(values_, 2, 0);
    odd_ = Every(values_, 2, 1);
#else
    borders_ = count - 1;
#endif
  }

  Floats operator()(const Floats& u) const {
#if defined(__AVX512F__)
    // One bit of the entry's number at a time takes 12 instructions; comparing with all 15 borders would take 30.
    const __m512 value = (__m512)u.part[0];
    const auto above = [&](__m512 border) { return _mm512_cmp_ps_mask(value, border, _CMP_GT_OQ); };
    __m512i entry = _mm512_maskz_set1_epi32(above(half_), 8);
    const auto refine = [&](__m512 borders, int bit) {
      const __mmask16 higher = above(_mm512_maskz_permutexvar_ps(0xffff, entry, borders));
      entry = _mm512_mask_or_epi32(entry, higher, entry, _mm512_set1_epi32(bit));
    };
    refine(quarters_, 4);
    refine(eighths_, 2);
    refine(sixteenths_, 1);
    return {{(FloatRegister)_mm512_maskz_permutexvar_ps(0xffff, entry, table_)}};
#elif defined(__AVX2__)
    return Each<Floats>([&](int r) {
      // The bits of the number so far are the index for a permutation of 8 lanes.
      const __m256 value = (__m256)u.part[r];
      const auto above = [&](__m256 border) { return _mm256_cmp_ps(value, border, _CMP_GT_OQ); };
      // A true comparison is all ones, -1: subtracting it from the doubled index appends a bit.
      const auto with = [](__m256i index, __m256 bit) {
        return _mm256_sub_epi32(_mm256_add_epi32(index, index), _mm256_castps_si256(bit));
      };
      __m256i index = with(_mm256_setzero_si256(), above(half_));
      index = with(index, above(_mm256_permutevar8x32_ps(quarters_, index)));
      index = with(index, above(_mm256_permutevar8x32_ps(eighths_, index)));
      const __m256 last = above(_mm256_permutevar8x32_ps(sixteenths_, index));
      return (FloatRegister)_mm256_blendv_ps(_mm256_permutevar8x32_ps(even_, index),
                                             _mm256_permutevar8x32_ps(odd_, index), last);
    });
#else
    Floats level = All(values_[0]);
    for (int64_t i = 0; i < borders_; ++i) level = Where(All(middles_[i]) < u, All(values_[i + 1]), level);
    return level;
#endif
  }

  float first() const { return values_[0]; }
  float last() const { return values_[kMaxEntries - 1]; }

 private:
  float values_[kMaxEntries], middles_[kMaxEntries];
#if defined(__AVX512F__)
  // For each multiple of `stride`, the border `place` above it, in all lanes up to the next multiple.
  __m512 Every(int stride, int place) const {
    float borders[kLanes];
    for (int i = 0; i < kLanes; ++i) borders[i] = middles_[i / stride * stride + place];
    return _mm512_loadu_ps(borders);
  }
  __m512 table_, half_, quarters_, eighths_, sixteenths_;
#elif defined(__AVX2__)
  // The values that lie `place` above each multiple of `stride`, one after another.
  static __m256 Every(const float* from, int stride, int place) {
    float taken[8];
    for (int i = 0; i < 8; ++i) taken[i] = from[i * stride % kMaxEntries + place];
    return _mm256_loadu_ps(taken);
  }
  __m256 half_, quarters_, eighths_, sixteenths_, even_, odd_;
#else
  int64_t borders_;
#endif
};

}  // namespace
}  // namespace any4
