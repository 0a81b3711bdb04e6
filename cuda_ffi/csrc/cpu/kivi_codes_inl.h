// Products of a vector and a matrix of packed codes, read as they are stored; each instruction set's kivi_inl.h includes
// this one.
//
// A register holds `kRegister` words of codes, and code number c of all its words makes one register of sums. Codes stay
// where they are in their words: masked, they are multiplied by a power of two too many, which the sums lose at the end.
#pragma once

#include "attention_inl.h"

namespace any4 {
namespace {

typedef uint32_t WordRegister __attribute__((vector_size(4 * kRegister)));

// Where lanes find their numbers among a few that follow one another.
struct Places {
  int32_t of[kRegister];
};

#if defined(__AVX2__) && !defined(__AVX512F__)
// The first `count` of eight, then zeros. Most counts are 1, 2 or 4, which one instruction loads; what goes through memory
// waits for it.
inline __attribute__((always_inline)) __m128i FewHalves(const uint16_t* from, int count) {
  if (count == 1) return _mm_cvtsi32_si128(*from);
  if (count == 4) return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from));
  if (count == 2) {
    int32_t two;
    __builtin_memcpy(&two, from, sizeof two);
    return _mm_cvtsi32_si128(two);
  }
  uint16_t some[8] = {};
  __builtin_memcpy(some, from, count * sizeof(uint16_t));
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(some));
}
#endif

// Lane j is from[places.of[j]], or zero if that isn't below `count`, which is at most kRegister. `alike`: all lanes are
// from[0].
template <class T>
inline __attribute__((always_inline)) FloatRegister Few(const T* from, const Places& places, int count, bool alike) {
  if (alike) return ToFloat(*from) - FloatRegister{};
#if defined(__AVX512F__)
  const __mmask16 mask = static_cast<__mmask16>((1u << count) - 1);
  __m512 few;
  if constexpr (sizeof(T) == 4) {
    few = _mm512_maskz_loadu_ps(mask, from);
  } else {
    few = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from)), 16));
  }
  return (FloatRegister)_mm512_permutexvar_ps(_mm512_loadu_si512(places.of), few);
#else
#if defined(__AVX2__)
  const __m256i of = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(places.of));
  __m256 few;
  if constexpr (sizeof(T) == 4) {
    const __m256i first = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    few = _mm256_maskload_ps(from, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), first));
  } else {
    const __m256i narrow = _mm256_cvtepu16_epi32(FewHalves(from, count));
    few = _mm256_castsi256_ps(_mm256_slli_epi32(narrow, 16));
  }
  return (FloatRegister)_mm256_permutevar8x32_ps(few, of);
#else
  FloatRegister lanes;
  for (int j = 0; j < kRegister; ++j) lanes[j] = places.of[j] < count ? ToFloat(from[places.of[j]]) : 0.0f;
  return lanes;
#endif
#endif
}

// `words` words, then zeros.
inline __attribute__((always_inline)) WordRegister Words(const uint8_t* from, int64_t words) {
  WordRegister codes = {};
  if (words >= kRegister) {
    __builtin_memcpy(&codes, from, sizeof codes);
  } else {
    uint32_t some[kRegister] = {};
    __builtin_memcpy(some, from, words * 4);
    __builtin_memcpy(&codes, some, sizeof codes);
  }
  return codes;
}

// A register's width of a matrix of codes, or a few of its rows where they are narrower than that.
template <class T>
struct CodePanel {
  const uint8_t* codes;
  int64_t stride;  // bytes from a row to the next
  int64_t words;   // of a row that belong to the panel
  const T* steps;  // those of the panel's groups
  const T* lowest;
  int64_t pitch;   // from the steps of a row to those of the next
  int groups;      // of a row that are the panel's
  int together;    // rows that fill a register
  Places row, group;  // of each lane's word: which of the rows, and which of their groups
  int64_t ahead;      // bytes from what is read to what will be soon
};

// out[column] += sum over rows of factors[row] * (lowest + step * code), for kHeads vectors of factors and of results, and
// for the codes that are number kFirst and the next seven of their words. Columns are numbered from the panel's first.
template <int kBits, int kHeads, int kFirst, class T>
void AddProducts(const CodePanel<T>& panel, int64_t rows, const float* factors, int64_t factors_pitch, float* out,
                 int64_t out_pitch) {
  constexpr int kCodes = 32 / kBits, kAtOnce = 8;
  const int lanes = static_cast<int>(std::min<int64_t>(panel.words, kRegister / panel.together));
  const bool alike = panel.groups * panel.together == 1;
  FloatRegister sums[kHeads][kAtOnce] = {}, base[kHeads] = {};
  for (int64_t r = 0; r < rows; r += panel.together) {
    const int here = static_cast<int>(std::min<int64_t>(rows - r, panel.together));
    const uint8_t* const from = panel.codes + r * panel.stride;
    const WordRegister words = Words(from, here * panel.words);
    __builtin_prefetch(from + panel.ahead);
    const FloatRegister step = Few(panel.steps + r * panel.pitch, panel.group, here * panel.groups, alike);
    const FloatRegister least = Few(panel.lowest + r * panel.pitch, panel.group, here * panel.groups, alike);
    FloatRegister weights[kHeads];
#pragma GCC unroll 4
    for (int h = 0; h < kHeads; ++h) {
      const float* const own = factors + h * factors_pitch + r;
      const FloatRegister factor = Few(own, panel.row, here, panel.together == 1);
      weights[h] = factor * step;
      base[h] += factor * least;
    }
#pragma GCC unroll 8
    for (int i = 0; i < kAtOnce; ++i) {
      const int shift = kBits * (kFirst + i);
      // The highest code would be a sign.
      const WordRegister code = shift + kBits == 32 ? words >> shift : words & (((1u << kBits) - 1) << shift);
      const FloatRegister number = __builtin_convertvector((IntRegister)code, FloatRegister);
#pragma GCC unroll 4
      for (int h = 0; h < kHeads; ++h) sums[h][i] += weights[h] * number;
    }
  }
  for (int i = 0; i < kAtOnce; ++i) {
    const int shift = kBits * (kFirst + i);
    const float unit = shift + kBits == 32 ? 1.0f : 1.0f / static_cast<float>(1u << shift);
    for (int h = 0; h < kHeads; ++h) {
      const FloatRegister found = sums[h][i] * unit + base[h];
      float* const to = out + h * out_pitch + kFirst + i;
      for (int j = 0; j < lanes * panel.together; ++j) to[j % lanes * kCodes] += found[j];
    }
  }
}

template <int kBits, int kHeads, class T>
void AddSomeProducts(const CodePanel<T>& panel, int64_t rows, const float* factors, int64_t factors_pitch, float* out,
                     int64_t out_pitch) {
  AddProducts<kBits, kHeads, 0>(panel, rows, factors, factors_pitch, out, out_pitch);
  if constexpr (kBits == 2) AddProducts<kBits, kHeads, 8>(panel, rows, factors, factors_pitch, out, out_pitch);
}

// The same for any number of vectors, and all codes.
template <int kBits, class T>
void AddAllProducts(const CodePanel<T>& panel, int64_t rows, int64_t heads, const float* factors, int64_t factors_pitch,
                    float* out, int64_t out_pitch) {
  // As many as there are registers for.
  constexpr int kHeads = kRegister == 16 ? 2 : 1;
  int64_t h = 0;
  for (; h + kHeads <= heads; h += kHeads) {
    AddSomeProducts<kBits, kHeads>(panel, rows, factors + h * factors_pitch, factors_pitch, out + h * out_pitch, out_pitch);
  }
  for (; h < heads; ++h) {
    AddSomeProducts<kBits, 1>(panel, rows, factors + h * factors_pitch, factors_pitch, out + h * out_pitch, out_pitch);
  }
}

}  // namespace
}  // namespace any4
