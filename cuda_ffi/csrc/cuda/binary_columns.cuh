// BinaryColumns: the product with up to eight rows of x by a sum of binary planes, which are the columns of a tensor
// core's product. A warp multiplies 16 rows of W. Bits become -1 and +1 of x's type, two of them by a shift and one logical
// operation, since the sign of a float is a bit; products and sums of a tile are then exact up to float32.
#pragma once

#include "binary_turns.cuh"

namespace any4 {

constexpr int kBinaryColumns = 8;
// A turn is two tiles, whose codes share the lines that memory is read in, and are loaded one turn ahead.
constexpr int kColumnsTurn = 2;

// The bits of two ones in a register.
template <typename T>
constexpr uint32_t kOnes = std::is_same_v<T, __half> ? 0x3C003C00 : 0x3F803F80;

// +1 where bits 15 and 31 are set, else -1; `signs` is 0x80008000.
template <typename T>
__device__ __forceinline__ uint32_t Sign(uint32_t bits, uint32_t signs) {
  return MaskAndFlip(bits, signs, kOnes<T> | 0x80008000u);
}

// Lane 4 g + t has the words t of rows g and g + 8 in a tile: its inputs of step s are bits s, s + 16, s + 8 and s + 24
// of them. The order of inputs is x's too, so that products don't depend on it.
template <typename T, int kPlanes>
__global__ void __launch_bounds__(32 * kBinaryWarps, 2)
    BinaryColumns(const __grid_constant__ BinaryWeight w, const T* __restrict__ x, int m, T* __restrict__ y) {
  __shared__ float totals[kBinaryWarps][128];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int64_t first = int64_t{blockIdx.x} * kBinaryRows;
  const uint32_t signs = InRegister(0x80008000u);
  // Where too few rows are left, the last is repeated, and the surplus is never stored.
  const auto row = [&](int r) { return static_cast<uint32_t>(min(first + g + 8 * r, w.n - 1)); };
  const int tiles = static_cast<int>(w.k / kBinaryTile);
  const auto row_bytes = static_cast<uint32_t>(w.k / 8), groups = static_cast<uint32_t>(w.groups);
  const uint32_t codes[2] = {row(0) * row_bytes + 4 * t, row(1) * row_bytes + 4 * t};
  const uint32_t scales[2] = {row(0) * groups, row(1) * groups};
  uint32_t words[kColumnsTurn][kPlanes][2] = {};
  const auto load = [&](int tile, int of_turn) {
    if (tile >= tiles) return;
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
#pragma unroll
      for (int r = 0; r < 2; ++r) words[of_turn][p][r] = LoadAt<uint32_t>(w.planes[p].codes, codes[r] + tile * 16);
    }
  };
#pragma unroll
  for (int i = 0; i < kColumnsTurn; ++i) load(kColumnsTurn * warp + i, i);
  // A table is its middle -+ half its step.
  float half[kPlanes][2], middle[kPlanes][2];
  bool shifted = false;
#pragma unroll
  for (int p = 0; p < kPlanes; ++p) {
    const BinaryPlane& plane = w.planes[p];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t at = plane.own_tables ? 2 * row(r) : 0;
      const float least = FloatAt(plane.lut, at), most = FloatAt(plane.lut, at + 1);
      half[p][r] = (most - least) / 2;
      middle[p][r] = (most + least) / 2;
      shifted = shifted || middle[p][r] != 0 || plane.offsets != nullptr;
    }
  }
  shifted = __any_sync(0xffffffffu, shifted);

  float total[4] = {};
  for (int turn = kColumnsTurn * warp; turn < tiles; turn += kColumnsTurn * kBinaryWarps) {
#pragma unroll
    for (int i = 0; i < kColumnsTurn; ++i) {
      const int tile = turn + i;
      if (tile >= tiles) break;
      uint4 values[4] = {};
      if (g < m) {
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          values[j] = __ldg(reinterpret_cast<const uint4*>(x + g * w.k + tile * kBinaryTile + 32 * t) + j);
        }
      }
      const uint32_t group = static_cast<uint32_t>(tile) >> w.group_shift;
      float scale[kPlanes][2];
#pragma unroll
      for (int p = 0; p < kPlanes; ++p) {
#pragma unroll
        for (int r = 0; r < 2; ++r) scale[p][r] = FloatAt(w.planes[p].scales, scales[r] + group);
      }
      // Of step s: inputs s and s + 16, then s + 8 and s + 24.
      const auto input = [&](int step, int at) {
        const auto word = [&](int j) {
          const uint4& four = values[j / 4];
          return j % 4 == 0 ? four.x : j % 4 == 1 ? four.y : j % 4 == 2 ? four.z : four.w;
        };
        return Permute(word(step / 2 + 4 * at), word(step / 2 + 4 * at + 8), step % 2 ? 0x7632 : 0x5410);
      };
      uint32_t inputs[8][2];
#pragma unroll
      for (int step = 0; step < 8; ++step) inputs[step][0] = input(step, 0), inputs[step][1] = input(step, 1);
#pragma unroll
      for (int p = 0; p < kPlanes; ++p) {
        const uint32_t low = words[i][p][0], high = words[i][p][1];
        float sum[4] = {};
#pragma unroll
        for (int step = 0; step < 8; ++step) {
          TensorProduct<T>(sum, Sign<T>(low << (15 - step), signs), Sign<T>(high << (15 - step), signs),
                           Sign<T>(low << (7 - step), signs), Sign<T>(high << (7 - step), signs), inputs[step][0],
                           inputs[step][1]);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) total[j] = fmaf(scale[p][j / 2] * half[p][j / 2], sum[j], total[j]);
      }
      load(tile + kColumnsTurn * kBinaryWarps, i);
      if (!shifted) continue;
      float sum[4] = {}, shift[2] = {};
#pragma unroll
      for (int step = 0; step < 8; ++step) {
        TensorProduct<T>(sum, kOnes<T>, kOnes<T>, kOnes<T>, kOnes<T>, inputs[step][0], inputs[step][1]);
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int p = 0; p < kPlanes; ++p) {
          shift[r] = fmaf(scale[p][r], middle[p][r], shift[r]);
          if (w.planes[p].offsets != nullptr) shift[r] += FloatAt(w.planes[p].offsets, scales[r] + group);
        }
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) total[j] = fmaf(shift[j / 2], sum[j], total[j]);
    }
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) totals[warp][4 * lane + i] = total[i];
  __syncthreads();
  if (threadIdx.x >= 128) return;
  float result = 0;
#pragma unroll
  for (int i = 0; i < kBinaryWarps; ++i) result += totals[i][threadIdx.x];
  const int owner = threadIdx.x / 4, part = threadIdx.x % 4;
  const int64_t of_w = first + owner / 4 + part / 2 * 8;
  const int column = owner % 4 * 2 + part % 2;
  if (of_w < w.n && column < m) Put(y + column * w.n + of_w, result);
}

}  // namespace any4
