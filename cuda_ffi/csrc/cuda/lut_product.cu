// LutProducts: chooses LutWide for many rows of x where it runs, else LutTurns where it takes the operands, else
// LutGeneral, whose grid is set here.
#include "lut_product.h"

#include <algorithm>

#include "device.h"
#include "lut_form.h"
#include "lut_general.cuh"
#include "lut_launch.h"
#include "lut_wide.h"

namespace any4 {
namespace {

template <typename T, int kBits>
cudaError_t Launch(const LutLaunch& launch, const Columns& columns, cudaStream_t stream) {
  const int64_t blocks = launch.Blocks(kTileRows), count = static_cast<int64_t>(columns.m) << columns.split;
  const int64_t turns = (launch.k() + kTileInputs - 1) / kTileInputs;
  const int warps = WarpsOfBlock(blocks, turns, 16);
  const dim3 grid(static_cast<unsigned>(blocks),
                  static_cast<unsigned>((count + kGeneralColumns - 1) / kGeneralColumns));
  LutGeneral<T, kBits><<<grid, dim3(32, warps), kShares * kGeneralColumns * kColumn * sizeof(float), stream>>>(
      launch.Batch(kTileRows), Shares(turns, warps), static_cast<const T*>(launch.x), columns);
  return cudaGetLastError();
}

template <typename T>
cudaError_t OfBits(const LutLaunch& launch, const Columns& columns, cudaStream_t stream) {
  switch (launch.bits) {
    case 2: return Launch<T, 2>(launch, columns, stream);
    case 3: return Launch<T, 3>(launch, columns, stream);
    case 4: return Launch<T, 4>(launch, columns, stream);
    default: return Launch<T, 8>(launch, columns, stream);
  }
}

cudaError_t LaunchGeneral(const LutLaunch& launch, cudaStream_t stream) {
  Columns columns{static_cast<int>(launch.m), 0, 0};
  while (kTileInputs >> columns.split > launch.group_size) ++columns.split;
  const int64_t inputs = std::min(launch.group_size, launch.k());
  while (static_cast<int64_t>(kTileInputs) << columns.group_shift < inputs) ++columns.group_shift;
  return launch.type == Type::kFloat16 ? OfBits<__half>(launch, columns, stream)
                                       : OfBits<__nv_bfloat16>(launch, columns, stream);
}

cudaError_t LaunchTurns(const LutLaunch& launch, cudaStream_t stream) {
  if (launch.type == Type::kFloat16) return LaunchTurnsFloat16(launch, stream);
  return launch.bits == 4 ? LaunchTurnsBfloat16(launch, stream) : LaunchTurnsWidths(launch, stream);
}

}  // namespace

int64_t LutLaunch::Blocks(int64_t rows) const {
  int64_t blocks = 0;
  for (int i = 0; i < count; ++i) blocks += (ws[i].n + rows - 1) / rows;
  return blocks;
}

LutBatch LutLaunch::Batch(int64_t rows) const {
  LutBatch batch{};
  int64_t blocks = 0;
  for (int i = 0; i < count; ++i) {
    batch.weights[i] = ws[i];
    batch.results[i] = ys[i];
    batch.ends[i] = static_cast<unsigned>(blocks += (ws[i].n + rows - 1) / rows);
  }
  return batch;
}

int WarpsOfBlock(int64_t blocks, int64_t turns, int resident) {
  int warps = blocks <= resident / 8 * Multiprocessors() ? 8 : 4;
  while (warps > turns) warps /= 2;
  return warps;
}

cudaError_t LutProducts(const LutWeight* ws, void* const* ys, int count, int bits, int64_t group_size, const void* x,
                        int64_t m, Type type, cudaStream_t stream) {
  const auto form = [&](int i) { return FormOf(ws[i], bits, group_size, type); };
  const auto for_turns = [&](int i) { return IsForTurns(form(i)); };
  const auto wide = [&](int i) { return WideLaunch{ws[i], ys[i], group_size, x, m, type}; };
  // Up to so many rows the other kernels are faster: they decode a weight once for 32 rows (LutTurns) or for 8.
  const auto for_wide = [&](int i) {
    return m > (for_turns(i) ? 32 : 8) && IsForWide(form(i)) && CanLaunchWide(wide(i));
  };
  // Weights that need another kernel, or another instance of it, than the one before them begin another launch.
  const auto alike = [&](int i, int j) {
    return for_turns(i) == for_turns(j) && !for_wide(j) && (ws[i].offsets == nullptr) == (ws[j].offsets == nullptr) &&
           ws[i].scale_type == ws[j].scale_type;
  };
  for (int first = 0, last; first < count; first = last) {
    last = first + 1;
    if (for_wide(first)) {
      // Each weight has its own launch: it fills the GPU, and its bits don't depend on the others.
      const cudaError_t error = LaunchWide(wide(first), stream);
      if (error != cudaSuccess) return error;
      continue;
    }
    while (last < count && last - first < kMostTogether && alike(first, last)) ++last;
    const LutLaunch launch{ws + first, ys + first, last - first, bits, group_size, x, m, type};
    const cudaError_t error = for_turns(first) ? LaunchTurns(launch, stream) : LaunchGeneral(launch, stream);
    if (error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace any4
