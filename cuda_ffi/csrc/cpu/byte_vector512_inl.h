// What the kernels of 512 bits have in common. Each includes it inside its own namespace.

#include "byte_order_inl.h"

struct Vector512 {
  using Bytes = __m512i;
  using Ints = __m512i;
  using Floats = __m512;
  static constexpr int kLanes = 16;
  static constexpr bool kUnsigned = true, kReadsStored = true;
  static constexpr int kRowsOfOne = 4, kRows = 4, kInputs = 4, kTokenInputs = 4, kManyAtOnce = 6;
  using TokenWeight = uint8_t;
  using TokenQ = int8_t;

  static Bytes Load(const void* from) { return _mm512_loadu_si512(from); }
  static void StoreBytes(void* to, Bytes value) { _mm512_storeu_si512(to, value); }
  static Bytes Hold(Bytes value) {
    asm("" : "+v"(value));
    return value;
  }
  static Bytes Ones() { return _mm512_set1_epi8(1); }
  static void Whole(Bytes first, Bytes second, Bytes* low, Bytes* high) {
    *low = _mm512_shuffle_i64x2(first, second, 0x88);
    *high = _mm512_shuffle_i64x2(first, second, 0xdd);
  }
  static Bytes LoadFirstBytes(const uint8_t* from, int64_t count) {
    return _mm512_maskz_loadu_epi8(count >= 64 ? ~uint64_t{0} : (uint64_t{1} << count) - 1, from);
  }
  static Ints Zero() { return _mm512_setzero_si512(); }
  static Ints LoadInts(const int32_t* from) { return Load(from); }
  static void StoreInts(int32_t* to, Ints value) { _mm512_storeu_si512(to, value); }
  static Ints Dot(Ints sum, Bytes weights, Bytes q) { return _mm512_dpbusd_epi32(sum, weights, q); }
  static Ints TokenDot(Ints sum, Bytes weights, Bytes q) { return Dot(sum, weights, q); }
  static Ints BroadcastInts(const void* from) {
    int32_t number;
    __builtin_memcpy(&number, from, sizeof number);
    return _mm512_set1_epi32(number);
  }
  static void Turn(Bytes (&rows)[kLanes]) {
    Bytes fours[kLanes];
    for (int i = 0; i < kLanes; i += 4) {
      const Bytes a = _mm512_unpacklo_epi32(rows[i], rows[i + 1]), b = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
      const Bytes c = _mm512_unpacklo_epi32(rows[i + 2], rows[i + 3]), d = _mm512_unpackhi_epi32(rows[i + 2], rows[i + 3]);
      fours[i] = _mm512_unpacklo_epi64(a, c);
      fours[i + 1] = _mm512_unpackhi_epi64(a, c);
      fours[i + 2] = _mm512_unpacklo_epi64(b, d);
      fours[i + 3] = _mm512_unpackhi_epi64(b, d);
    }
    for (int i = 0; i < 4; ++i) {
      const Bytes even = _mm512_shuffle_i32x4(fours[i], fours[4 + i], 0x88), odd = _mm512_shuffle_i32x4(fours[i], fours[4 + i], 0xdd);
      const Bytes after = _mm512_shuffle_i32x4(fours[8 + i], fours[12 + i], 0x88);
      const Bytes last = _mm512_shuffle_i32x4(fours[8 + i], fours[12 + i], 0xdd);
      rows[i] = _mm512_shuffle_i32x4(even, after, 0x88);
      rows[4 + i] = _mm512_shuffle_i32x4(odd, last, 0x88);
      rows[8 + i] = _mm512_shuffle_i32x4(even, after, 0xdd);
      rows[12 + i] = _mm512_shuffle_i32x4(odd, last, 0xdd);
    }
  }
  static void TurnFloats(Floats (&rows)[kLanes]) {
    Bytes turned[kLanes];
    for (int i = 0; i < kLanes; ++i) turned[i] = _mm512_castps_si512(rows[i]);
    Turn(turned);
    for (int i = 0; i < kLanes; ++i) rows[i] = _mm512_castsi512_ps(turned[i]);
  }
  static void StoreFloats(float* to, Floats value) { _mm512_storeu_ps(to, value); }
  static Floats ZeroFloats() { return _mm512_setzero_ps(); }
  static Floats Broadcast(float value) { return _mm512_set1_ps(value); }
  static Floats LoadFloats(const float* from) { return _mm512_loadu_ps(from); }
  // The first `count` floats, then zeros; `count` may exceed the number of lanes.
  static Floats LoadFirst(const float* from, int64_t count) {
    const __mmask16 wanted = count >= kLanes ? 0xffff : static_cast<__mmask16>((1u << count) - 1);
    return _mm512_maskz_loadu_ps(wanted, from);
  }
  static Floats LoadStored(const void* from, Type type, int64_t at, int64_t count) {
    const __mmask16 wanted = count >= kLanes ? 0xffff : static_cast<__mmask16>((1u << count) - 1);
    if (type == Type::kBfloat16) {
      const __m256i halves = _mm256_maskz_loadu_epi16(wanted, static_cast<const uint16_t*>(from) + at);
      return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
    }
    if (type == Type::kFloat32) return _mm512_maskz_loadu_ps(wanted, static_cast<const float*>(from) + at);
    const __m128i exponents = _mm_maskz_loadu_epi8(wanted, static_cast<const uint8_t*>(from) + at);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu8_epi32(exponents), 23));
  }
  static Floats PickLanes(Floats from, Ints lanes) { return _mm512_permutexvar_ps(lanes, from); }
  static Floats Pick(const float* from, const int32_t* lanes) {
    return _mm512_permutexvar_ps(LoadInts(lanes), LoadFloats(from));
  }
  static Floats Multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
  static Floats Fma(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats ToFloats(Ints a) { return _mm512_cvtepi32_ps(a); }
  static Ints Nearest(Floats a) { return _mm512_cvtps_epi32(a); }
  // The bits of the magnitudes.
  static Ints Magnitude(Floats a) { return _mm512_and_si512(_mm512_castps_si512(a), _mm512_set1_epi32(0x7fffffff)); }
  static Ints Larger(Ints a, Ints b) { return _mm512_max_epi32(a, b); }
  static int32_t Largest(Ints a) { return _mm512_reduce_max_epi32(a); }
  // 32 integers of 8 bits: even and odd ones apart where codes have 4 bits, else the first and the second half.
  template <int kBits>
  static void StoreGroup(const Ints* q, int8_t* low, int8_t* high) {
    __m256i bytes = _mm256_set_m128i(_mm512_cvtepi32_epi8(q[1]), _mm512_cvtepi32_epi8(q[0]));
    if constexpr (kBits == 4) bytes = EvenThenOdd(bytes);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(low), _mm256_castsi256_si128(bytes));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(high), _mm256_extracti128_si256(bytes, 1));
  }
  static void StoreSums(const Floats (&a)[4], float* to) {
    const __m512 first = _mm512_add_ps(_mm512_unpacklo_ps(a[0], a[1]), _mm512_unpackhi_ps(a[0], a[1]));
    const __m512 second = _mm512_add_ps(_mm512_unpacklo_ps(a[2], a[3]), _mm512_unpackhi_ps(a[2], a[3]));
    const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(first, second, 0x44), _mm512_shuffle_ps(first, second, 0xee));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  }
  static float Sum(Floats a) { return _mm512_reduce_add_ps(a); }

  // value + 128 of each entry, four times over.
  struct Table {
    Bytes values;

    void Set(const int8_t* table) {
      const __m128i once = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
      values = _mm512_xor_si512(_mm512_broadcast_i32x4(once), _mm512_set1_epi8(-128));
    }
  };
};
