// Chooses the instance of LutTurns and its grid. Several files include this one, so that they compile in parallel.
#pragma once

#include "device.h"
#include "lut_launch.h"
#include "lut_turns.cuh"

namespace any4 {

template <typename T, typename Of>
cudaError_t LaunchInstance(const LutLaunch& launch, int warps, cudaStream_t stream) {
  constexpr int kRows = Of::kTiles * kTileRows;
  constexpr int kBytes = kShares * Of::kTiles * Of::kCount * kColumn * static_cast<int>(sizeof(float)) +
                         (Of::kBits == 4 && Of::kCount == 1 ? kPairTableBytes : 0);
  static_assert(kBytes <= 48 * 1024, "what a kernel gets unasked");
  int group_shift = 0;
  for (int64_t inputs = kTileInputs; inputs < launch.group_size && inputs < launch.k(); inputs *= 2) ++group_shift;
  const dim3 grid(static_cast<unsigned>(launch.Blocks(kRows)),
                  static_cast<unsigned>((launch.m + Of::kCount - 1) / Of::kCount));
  const Shares shares(launch.k() / (2 * kTileInputs), warps);
  LutTurns<T, Of><<<grid, dim3(32, warps), kBytes, stream>>>(
      launch.Batch(kRows), shares, static_cast<const T*>(launch.x), static_cast<int>(launch.m), group_shift);
  return cudaGetLastError();
}

// For 4-bit codes.
template <typename T, int kGroups, bool kOffsets, bool kExponents = false>
cudaError_t LaunchRows(const LutLaunch& launch, cudaStream_t stream) {
  const int64_t tiles = launch.Blocks(kTileRows), turns = launch.k() / (2 * kTileInputs), m = launch.m;
  const int warps = WarpsOfBlock(tiles, turns, 16), warps_of_two = WarpsOfBlock(tiles / 2, turns, 8);
  // Blocks of 64 rows of x would decode once what blocks of 32 decode twice, but too few registers would be left.
  if (m > 16) return LaunchInstance<T, TurnsOf<4, 32, 2, kGroups, kOffsets, kExponents>>(launch, warps_of_two, stream);
  if (m > 8) return LaunchInstance<T, TurnsOf<4, 16, 2, kGroups, kOffsets, kExponents>>(launch, warps_of_two, stream);
  if constexpr (kGroups == 1) {
    // Two tiles are a little faster where all their blocks are resident at once, and slower where some must wait.
    const int64_t multiprocessors = Multiprocessors();
    const bool two = tiles > 3 * multiprocessors && tiles <= 4 * multiprocessors;
    if (m > 1 && two) return LaunchInstance<T, TurnsOf<4, 8, 2, kGroups, kOffsets>>(launch, warps_of_two, stream);
  }
  if (m > 1) return LaunchInstance<T, TurnsOf<4, 8, 1, kGroups, kOffsets, kExponents>>(launch, warps, stream);
  return LaunchInstance<T, TurnsOf<4, 1, 1, kGroups, kOffsets, kExponents>>(launch, warps, stream);
}

template <typename T, int kGroups>
cudaError_t LaunchGroups(const LutLaunch& launch, cudaStream_t stream) {
  return launch.ws[0].offsets == nullptr ? LaunchRows<T, kGroups, false>(launch, stream)
                                         : LaunchRows<T, kGroups, true>(launch, stream);
}

}  // namespace any4
