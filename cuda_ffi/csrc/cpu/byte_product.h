// y = x W^T for x rounded to int8 and the W of weight.h, whose values are integers of 8 bits: those of a table, or the
// steps of a ramp, which a table of floats must be: middle + step * (code - 2^(bits - 1)).
//
// kGroup inputs in a row share a scale a, the largest of their magnitudes / 127. With q = round(x / a):
//   y[m, n] = sum over weight groups g of
//       scales[n, g] * sum over input groups b in g of a[m, b] * (sum over k in b of value(codes[n, k]) * q[m, k])
//     + offsets[n, g] * sum over b in g of a[m, b] * (sum over k in b of q[m, k])
// Sums over k are exact, others float32.
#pragma once

#include <cstdint>

#include "isa.h"
#include "threads.h"
#include "weight.h"

namespace any4 {

constexpr int64_t kGroup = 32;

// The products of one x [m, k] with `count` weights, which agree in k, bits and group_size. x is rounded once, and
// threads share the rows of all weights as if they were one matrix. x and y are both of `type`, float32 or bf16.
void ByteProducts(const Product* products, int64_t count, const void* x, int64_t m, Type type, Isa isa,
                  const Executor& executor);

}  // namespace any4
