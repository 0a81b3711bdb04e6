// Sixteen float32 lanes, in as many registers as the including file's instruction set needs for them.
#pragma once

#include <cstdint>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace any4 {
namespace {

constexpr int kLanes = 16;
#if defined(__AVX512F__)
constexpr int kRegister = 16;
#elif defined(__AVX2__)
constexpr int kRegister = 8;
#else
constexpr int kRegister = 4;
#endif
constexpr int kRegisters = kLanes / kRegister;

typedef float FloatRegister __attribute__((vector_size(4 * kRegister)));
typedef int32_t IntRegister __attribute__((vector_size(4 * kRegister)));

// The loops over registers have a constant count, so that the compiler keeps the parts apart and in registers.
struct Floats {
  FloatRegister part[kRegisters];
};

struct Ints {
  IntRegister part[kRegisters];
};

template <class Result, class Function>
inline __attribute__((always_inline)) Result Each(Function function) {
  Result result;
  for (int r = 0; r < kRegisters; ++r) result.part[r] = function(r);
  return result;
}

inline uint32_t BitsOf(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float FloatOf(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, sizeof value);
  return value;
}

inline Floats Load(const float* from) {
  return Each<Floats>([&](int r) {
    FloatRegister value;
    __builtin_memcpy(&value, from + r * kRegister, sizeof value);
    return value;
  });
}

// Stores Floats as float, or Ints as int32_t.
template <class Lanes>
inline void Store(void* to, const Lanes& value) {
  for (int r = 0; r < kRegisters; ++r) {
    __builtin_memcpy(static_cast<char*>(to) + r * sizeof value.part[r], &value.part[r], sizeof value.part[r]);
  }
}

inline Floats All(float value) {
  return Each<Floats>([&](int) { return value - FloatRegister{}; });
}

inline Ints AllInts(int32_t value) {
  return Each<Ints>([&](int) { return value - IntRegister{}; });
}

inline Floats operator+(const Floats& a, const Floats& b) {
  return Each<Floats>([&](int r) { return a.part[r] + b.part[r]; });
}

inline Floats operator-(const Floats& a, const Floats& b) {
  return Each<Floats>([&](int r) { return a.part[r] - b.part[r]; });
}

inline Floats operator*(const Floats& a, const Floats& b) {
  return Each<Floats>([&](int r) { return a.part[r] * b.part[r]; });
}

inline Ints operator<(const Floats& a, const Floats& b) {
  return Each<Ints>([&](int r) { return a.part[r] < b.part[r]; });
}

inline Ints operator==(const Floats& a, const Floats& b) {
  return Each<Ints>([&](int r) { return a.part[r] == b.part[r]; });
}

inline Floats Where(const Ints& condition, const Floats& a, const Floats& b) {
  return Each<Floats>([&](int r) { return condition.part[r] ? a.part[r] : b.part[r]; });
}

inline Ints Where(const Ints& condition, const Ints& a, const Ints& b) {
  return Each<Ints>([&](int r) { return condition.part[r] ? a.part[r] : b.part[r]; });
}

inline Floats Minimum(const Floats& a, const Floats& b) { return Where(a < b, a, b); }
inline Floats Maximum(const Floats& a, const Floats& b) { return Where(a < b, b, a); }
inline Floats Absolute(const Floats& a) { return Maximum(a, All(0) - a); }

inline double SumOf(const Floats& lanes) {
  float values[kLanes];
  Store(values, lanes);
  double sum = 0;
  for (const float value : values) sum += value;
  return sum;
}

// a / b to about one unit in the last place, if b is a normal number.
inline Floats Divide(const Floats& a, const Floats& b) {
#ifdef __AVX512F__
  // A division takes 10 cycles for 16 lanes; an estimate of 14 bits and one Newton step take 4.
  const __m512 divisor = (__m512)b.part[0];
  // The masked form, since the plain one starts from an undefined register, about which g++ warns.
  const __m512 estimate = _mm512_maskz_rcp14_ps(0xffff, divisor);
  const __m512 correction = _mm512_fnmadd_ps(divisor, estimate, _mm512_set1_ps(2.0f));
  return {{(FloatRegister)_mm512_mul_ps((__m512)a.part[0], _mm512_mul_ps(estimate, correction))}};
#else
  return Each<Floats>([&](int r) { return a.part[r] / b.part[r]; });
#endif
}

}  // namespace
}  // namespace any4
