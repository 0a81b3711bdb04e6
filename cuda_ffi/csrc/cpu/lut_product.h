// y = x W^T in floats, for the W of weight.h, which is read as it is stored.
#pragma once

#include <cstdint>

#include "isa.h"
#include "threads.h"
#include "weight.h"

namespace any4 {

// The products of one x [m, k] with `count` weights, which agree in k, bits and group_size. Each is the sum of `planes`
// consecutive ones, of which the first has the y; more than one only with codes of 1 bit. Threads share the rows of all
// weights as if they were one matrix. x and y are both of `type`, float32 or bf16; sums are float32.
void LutProducts(const Product* products, int64_t count, int64_t planes, const void* x, int64_t m, Type type, Isa isa,
                 const Executor& executor);

}  // namespace any4
