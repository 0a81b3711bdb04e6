#include "slots.h"

#include <cuda_runtime_api.h>

#include <algorithm>

#include "device.h"

namespace any4 {
namespace {

constexpr int64_t kMostBytes = int64_t{512} << 20;

}  // namespace

Slots SlotsFor(const void* kernel, int threads, int64_t rows, int64_t bytes) {
  int resident = 1;
  cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, 0);
  const int64_t wanted = std::min(rows, int64_t{resident} * Multiprocessors());
  return {static_cast<int>(std::max<int64_t>(1, std::min(wanted, kMostBytes / bytes))), bytes};
}

}  // namespace any4
