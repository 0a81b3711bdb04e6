// Chooses the instance of LutTurns and its grid.
#include "lut_turns.cuh"

#include "lut_launch.h"

namespace any4 {
namespace {

template <typename T, typename Of>
cudaError_t Launch(const LutWeight& w, const void* x, void* y, int64_t m, int warps, cudaStream_t stream) {
  constexpr int kKept = (Of::kCount + 7) / 8 * 8;
  const int sums = warps * Of::kTiles * kKept * kTileRows * static_cast<int>(sizeof(float));
  const int bytes = Of::kCount == 1 && sums < kPairTableBytes ? kPairTableBytes : sums;
  const dim3 grid(static_cast<unsigned>(w.n / (Of::kTiles * kTileRows)),
                  static_cast<unsigned>((m + Of::kCount - 1) / Of::kCount));
  LutTurns<T, Of><<<grid, dim3(32, warps), bytes, stream>>>(w, static_cast<const T*>(x), static_cast<T*>(y),
                                                            static_cast<int>(m));
  return cudaGetLastError();
}

template <typename T, bool kOffsets>
cudaError_t OfRows(const LutWeight& w, int groups, const void* x, void* y, int64_t m, cudaStream_t stream) {
  const int64_t tiles = w.n / kTileRows, turns = w.k / (2 * kTileInputs), multiprocessors = Multiprocessors();
  const int warps = WarpsOfBlock(tiles, turns, 16), warps_of_two = WarpsOfBlock(tiles / 2, turns, 8);
  if (m > 16) return Launch<T, TurnsOf<32, 2, 1, kOffsets>>(w, x, y, m, warps_of_two, stream);
  if (m > 8) return Launch<T, TurnsOf<16, 2, 1, kOffsets>>(w, x, y, m, warps_of_two, stream);
  // Two tiles are a little faster where their blocks are all at work at once, and slower where some come later.
  const bool two = tiles > 3 * multiprocessors && tiles <= 4 * multiprocessors;
  if (m > 1 && two) return Launch<T, TurnsOf<8, 2, 1, kOffsets>>(w, x, y, m, warps_of_two, stream);
  if (m > 1) return Launch<T, TurnsOf<8, 1, 1, kOffsets>>(w, x, y, m, warps, stream);
  if (groups == 4) return Launch<T, TurnsOf<1, 1, 4, kOffsets>>(w, x, y, m, warps, stream);
  if (groups == 2) return Launch<T, TurnsOf<1, 1, 2, kOffsets>>(w, x, y, m, warps, stream);
  return Launch<T, TurnsOf<1, 1, 1, kOffsets>>(w, x, y, m, warps, stream);
}

template <typename T>
cudaError_t OfOffsets(const LutWeight& w, int groups, const void* x, void* y, int64_t m, cudaStream_t stream) {
  return w.offsets == nullptr ? OfRows<T, false>(w, groups, x, y, m, stream)
                              : OfRows<T, true>(w, groups, x, y, m, stream);
}

}  // namespace

bool IsForTurns(const LutWeight& w, int bits, int64_t group_size, int64_t m) {
  const bool groups = group_size == 128 || (m == 1 && (group_size == 64 || group_size == 32));
  return bits == 4 && groups && w.k > group_size && w.k % (2 * kTileInputs) == 0 && w.n % (2 * kTileRows) == 0 &&
         w.scale_type == Type::kBfloat16 && (w.offsets == nullptr || w.offset_type == Type::kBfloat16);
}

cudaError_t LaunchTurns(const LutWeight& w, int64_t group_size, const void* x, void* y, int64_t m, Type type,
                        cudaStream_t stream) {
  const int groups = static_cast<int>(kTileInputs / group_size);
  return type == Type::kFloat16 ? OfOffsets<__half>(w, groups, x, y, m, stream)
                                : OfOffsets<__nv_bfloat16>(w, groups, x, y, m, stream);
}

}  // namespace any4
