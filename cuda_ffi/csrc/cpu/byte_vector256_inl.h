// What the kernels of 256 bits have in common, AVX2's and AVX-VNNI's. Each includes it inside its own namespace.

#include "byte_order_inl.h"

struct Vector256 {
  using Bytes = __m256i;
  using Ints = __m256i;
  using Floats = __m256;
  static constexpr int kLanes = 8;
  static constexpr bool kReadsStored = false;

  static Bytes Load(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
  static void StoreBytes(void* to, Bytes value) { _mm256_storeu_si256(static_cast<__m256i*>(to), value); }
  static Bytes Hold(Bytes value) {
    asm("" : "+x"(value));
    return value;
  }
  static Bytes Ones() { return _mm256_set1_epi8(1); }
  static Bytes Low(Bytes codes) { return _mm256_and_si256(codes, _mm256_set1_epi8(15)); }
  static Bytes High(Bytes codes) { return Low(_mm256_srli_epi16(codes, 4)); }
  static void Whole(const uint8_t* codes, Bytes* low, Bytes* high) {
    const Bytes first = Load(codes), second = Load(codes + 32);
    *low = _mm256_permute2x128_si256(first, second, 0x20);
    *high = _mm256_permute2x128_si256(first, second, 0x31);
  }
  static Ints Zero() { return _mm256_setzero_si256(); }
  static Ints LoadInts(const int32_t* from) { return Load(from); }
  static void StoreInts(int32_t* to, Ints value) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), value); }
  static Floats ZeroFloats() { return _mm256_setzero_ps(); }
  static Floats Broadcast(float value) { return _mm256_set1_ps(value); }
  static Floats LoadFloats(const float* from) { return _mm256_loadu_ps(from); }
  // The first `count` floats, then zeros; `count` may exceed the number of lanes.
  static Floats LoadFirst(const float* from, int64_t count) {
    const Ints lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const Ints wanted = _mm256_cmpgt_epi32(_mm256_set1_epi32(count < kLanes ? static_cast<int>(count) : kLanes), lanes);
    return _mm256_maskload_ps(from, wanted);
  }
  static Floats Pick(const float* from, const int32_t* lanes) {
    return _mm256_permutevar8x32_ps(LoadFloats(from), LoadInts(lanes));
  }
  static Floats Multiply(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
  static Floats Fma(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Floats ToFloats(Ints a) { return _mm256_cvtepi32_ps(a); }
  static Ints Nearest(Floats a) { return _mm256_cvtps_epi32(a); }
  // The bits of the magnitudes.
  static Ints Magnitude(Floats a) { return _mm256_and_si256(_mm256_castps_si256(a), _mm256_set1_epi32(0x7fffffff)); }
  static Ints Larger(Ints a, Ints b) { return _mm256_max_epi32(a, b); }
  static int32_t Largest(Ints a) {
    const __m128i four = _mm_max_epi32(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
    const __m128i two = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x0e));
    return _mm_cvtsi128_si32(_mm_max_epi32(two, _mm_shuffle_epi32(two, 0x01)));
  }
  // 32 integers of 8 bits: even and odd ones apart where codes have 4 bits, else the first and the second half.
  template <int kBits>
  static void StoreGroup(const Ints* q, int8_t* low, int8_t* high) {
    // Packing works within halves of 128 bits, so fours end up out of order.
    const __m256i packed = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    __m256i bytes = _mm256_permutevar8x32_epi32(packed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
    if constexpr (kBits == 4) bytes = EvenThenOdd(bytes);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low), _mm256_castsi256_si128(bytes));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm256_extracti128_si256(bytes, 1));
  }
  static float Sum(Floats a) {
    const __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
  }

  struct SignedTable {
    Bytes values;

    void Set(const int8_t* table) {
      values = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(table)));
    }
    Bytes Look(Bytes index) const { return _mm256_shuffle_epi8(values, index); }
  };

  struct UnsignedTable : SignedTable {
    void Set(const int8_t* table) {
      SignedTable::Set(table);
      values = _mm256_xor_si256(values, _mm256_set1_epi8(-128));
    }
  };
};
