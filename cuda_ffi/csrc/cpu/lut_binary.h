// y = x W^T for a W that is a sum of binary planes, by tables of signed sums of inputs.
#pragma once

#include <cstdint>

#include "isa.h"
#include "threads.h"
#include "weight.h"

namespace any4 {

// Whether these groups can be multiplied by tables: none may end within a word of 32 codes.
inline bool HasBinaryGroups(int64_t k, int64_t group_size) { return group_size >= k || group_size % 32 == 0; }

// The products of one x [m, k] with `count` sums of `planes` weights of 1 bit. The planes of a sum are consecutive, and
// the first one's y is the sum's. All agree in k and group_size, for which HasBinaryGroups holds. x and y are both of
// `type`, float32 or bf16; sums are float32.
void BinaryProducts(const Product* products, int64_t count, int64_t planes, const void* x, int64_t m, Type type, Isa isa,
                    const Executor& executor);

}  // namespace any4
