// exp of float32 lanes; each instruction set's files include it.
#pragma once

#include "lanes_inl.h"

namespace any4 {
namespace {

// e^x to about one unit in the last place for x of at most 0; zero below -87, where it is next to nothing.
inline FloatRegister ExpOfNegative(const FloatRegister& x) {
  const FloatRegister zero = {};
  const IntRegister small = x < -87.0f + zero;
  const FloatRegister bounded = small ? -87.0f + zero : x;
  // Numbers this large have no fraction: what is added and taken away again rounds.
  const FloatRegister twos = (bounded * 1.44269504f + 0x1.8p23f) - 0x1.8p23f;
  const FloatRegister rest = (bounded - twos * 0.693359375f) - twos * -2.12194440e-4f;
  FloatRegister sum = 1.9875691500e-4f * rest + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  const IntRegister power = (__builtin_convertvector(twos, IntRegister) + 127) << 23;
  FloatRegister scale;
  __builtin_memcpy(&scale, &power, sizeof scale);
  return small ? zero : sum * scale;
}

}  // namespace
}  // namespace any4
