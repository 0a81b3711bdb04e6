// y = x W^T for x rounded to int8 and the W of weight.h, whose values are integers of 8 bits: those of a table, or the
// steps of a ramp, which a table of floats must be: middle + step * (code - 2^(bits - 1)).
//
// kGroup inputs in a row share a scale a, the largest of their magnitudes / 127. With q = round(x / a):
//   y[m, n] = sum over weight groups g of
//       scales[n, g] * sum over input groups b in g of a[m, b] * (sum over k in b of value(codes[n, k]) * q[m, k])
//     + offsets[n, g] * sum over b in g of a[m, b] * (sum over k in b of q[m, k])
// Or a whole row has one scale a and one zero point z:
//   y[m, n] = a[m] * sum over weight groups g of
//       scales[n, g] * (sum over k in g of value(codes[n, k]) * (q[m, k] - z[m]))
//     + offsets[n, g] * (sum over k in g of q[m, k] - z[m])
// Sums over k are exact, others float32.
#pragma once

#include <cstdint>

#include "isa.h"
#include "threads.h"
#include "weight.h"

namespace any4 {

constexpr int64_t kGroup = 32;

// In a row with one scale, groups of at most this many weights, so that their sums fit into 32 bits.
constexpr int64_t kLongestGroup = int64_t{1} << 18;

// How x is rounded to integers.
struct Rounding {
  bool by_row;     // one scale for a row of x, else one for each kGroup inputs, which are symmetric and have 8 bits
  int bits;        // 2 to 8
  bool symmetric;  // about zero, without a zero point
  // [given_rows, 3], for each row of x or, if given_rows is 1, for all: 1 / a, a and z. Null to find them.
  const float* given;
  int64_t given_rows;
};

// The products of one x [m, k] with `count` weights, which agree in k, bits and group_size. x is rounded once, and
// threads share the rows of all weights as if they were one matrix. x and y are both of `type`, float32 or bf16.
void ByteProducts(const Product* products, int64_t count, const void* x, int64_t m, Type type, const Rounding& rounding,
                  Isa isa, const Executor& executor);

}  // namespace any4
