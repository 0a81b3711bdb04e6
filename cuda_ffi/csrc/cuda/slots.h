// Device memory for kernels whose blocks take one row after another, each block in a slot of its own.
#pragma once

#include <cstdint>

namespace any4 {

struct Slots {
  int count;      // rows that are solved at a time, one a block
  int64_t bytes;  // of each slot
};

// Slots for `rows` rows: as many as there are blocks of `threads` threads at work at a time, and at most 512 MB of them
// unless one row alone takes more.
Slots SlotsFor(const void* kernel, int threads, int64_t rows, int64_t bytes);

}  // namespace any4
