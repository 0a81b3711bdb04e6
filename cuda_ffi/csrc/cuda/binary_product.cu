// A warp multiplies 16 rows of W with up to 8 rows of x on tensor cores. Bits become -1 and +1 of x's dtype, two of them
// by a shift and one logical operation, since the sign of a float is a bit; products and sums of a tile are then exact
// up to float32, and scales multiply the sums.
#include "binary_product.h"
#include "fragment.cuh"
#include "mask.cuh"

namespace any4 {
namespace {

constexpr int kWarps = 8;
constexpr int kRows = 16;
// A turn is two tiles, whose codes share the lines that memory is read in, and are loaded one turn ahead.
constexpr int kTurn = 2;

// The bits of two ones in a register.
template <typename T>
constexpr uint32_t kOnes = 0;
template <>
constexpr uint32_t kOnes<__nv_bfloat16> = 0x3F803F80;
template <>
constexpr uint32_t kOnes<__half> = 0x3C003C00;

// +1 where bits 15 and 31 are set, else -1; `signs` is 0x80008000.
template <typename T>
__device__ __forceinline__ uint32_t Signs(uint32_t bits, uint32_t signs) {
  return MaskAndFlip(bits, signs, kOnes<T> | 0x80008000u);
}

__device__ __forceinline__ void Put(__nv_bfloat16* to, float value) { *to = __float2bfloat16(value); }
__device__ __forceinline__ void Put(__half* to, float value) { *to = __float2half(value); }

// What lies `bytes` after an address; 32 bits for the distance save the additions that 64 take.
template <typename T>
__device__ __forceinline__ T Load(const void* from, uint32_t bytes) {
  return __ldg(reinterpret_cast<const T*>(static_cast<const uint8_t*>(from) + bytes));
}

__device__ __forceinline__ float At(const void* bfloat16, uint32_t i) {
  return __uint_as_float(uint32_t{Load<uint16_t>(bfloat16, 2 * i)} << 16);
}

// Lane 4 g + t has the words t of rows g and g + 8 in a tile: its inputs of step s are bits s, s + 16, s + 8 and s + 24
// of them. The order of inputs is x's too, so that products don't depend on it.
template <typename T, int kPlanes>
__global__ void __launch_bounds__(32 * kWarps, 2)
    Multiply(const __grid_constant__ BinaryWeight w, const T* __restrict__ x, int m, T* __restrict__ y) {
  __shared__ float totals[kWarps][128];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int64_t first = int64_t{blockIdx.x} * kRows;
  const uint32_t signs = InRegister(0x80008000u);
  // Where too few rows are left, the last is repeated, and the surplus is never stored.
  const auto row = [&](int r) { return static_cast<uint32_t>(min(first + g + 8 * r, w.n - 1)); };
  const int tiles = static_cast<int>(w.k / kBinaryTile);
  const auto row_bytes = static_cast<uint32_t>(w.k / 8), groups = static_cast<uint32_t>(w.groups);
  const uint32_t codes[2] = {row(0) * row_bytes + 4 * t, row(1) * row_bytes + 4 * t};
  const uint32_t scales[2] = {row(0) * groups, row(1) * groups};
  uint32_t words[kTurn][kPlanes][2] = {};
  const auto load = [&](int tile, int of_turn) {
    if (tile >= tiles) return;
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
#pragma unroll
      for (int r = 0; r < 2; ++r) words[of_turn][p][r] = Load<uint32_t>(w.planes[p].codes, codes[r] + tile * 16);
    }
  };
#pragma unroll
  for (int i = 0; i < kTurn; ++i) load(kTurn * warp + i, i);
  // A table is its middle -+ half its step.
  float half[kPlanes][2], middle[kPlanes][2];
  bool shifted = false;
#pragma unroll
  for (int p = 0; p < kPlanes; ++p) {
    const BinaryPlane& plane = w.planes[p];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const uint32_t at = plane.own_tables ? 2 * row(r) : 0;
      const float least = At(plane.lut, at), most = At(plane.lut, at + 1);
      half[p][r] = (most - least) / 2;
      middle[p][r] = (most + least) / 2;
      shifted = shifted || middle[p][r] != 0 || plane.offsets != nullptr;
    }
  }
  shifted = __any_sync(0xffffffffu, shifted);

  float total[4] = {};
  for (int turn = kTurn * warp; turn < tiles; turn += kTurn * kWarps) {
#pragma unroll
    for (int i = 0; i < kTurn; ++i) {
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
        for (int r = 0; r < 2; ++r) scale[p][r] = At(w.planes[p].scales, scales[r] + group);
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
          TensorProduct<T>(sum, Signs<T>(low << (15 - step), signs), Signs<T>(high << (15 - step), signs),
                           Signs<T>(low << (7 - step), signs), Signs<T>(high << (7 - step), signs), inputs[step][0],
                           inputs[step][1]);
        }
#pragma unroll
        for (int j = 0; j < 4; ++j) total[j] = fmaf(scale[p][j / 2] * half[p][j / 2], sum[j], total[j]);
      }
      load(tile + kTurn * kWarps, i);
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
          if (w.planes[p].offsets != nullptr) shift[r] += At(w.planes[p].offsets, scales[r] + group);
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
  for (int i = 0; i < kWarps; ++i) result += totals[i][threadIdx.x];
  const int owner = threadIdx.x / 4, part = threadIdx.x % 4;
  const int64_t of_w = first + owner / 4 + part / 2 * 8;
  const int column = owner % 4 * 2 + part % 2;
  if (of_w < w.n && column < m) Put(y + column * w.n + of_w, result);
}

template <typename T, int kPlanes>
cudaError_t LaunchPlanes(const BinaryWeight& weight, const void* x, int64_t m, void* y, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((weight.n + kRows - 1) / kRows);
  Multiply<T, kPlanes><<<blocks, 32 * kWarps, 0, stream>>>(weight, static_cast<const T*>(x), static_cast<int>(m),
                                                           static_cast<T*>(y));
  return cudaGetLastError();
}

template <typename T>
cudaError_t Launch(const BinaryWeight& weight, const void* x, int64_t m, void* y, cudaStream_t stream) {
  switch (weight.count) {
    case 1: return LaunchPlanes<T, 1>(weight, x, m, y, stream);
    case 2: return LaunchPlanes<T, 2>(weight, x, m, y, stream);
    case 3: return LaunchPlanes<T, 3>(weight, x, m, y, stream);
    default: return LaunchPlanes<T, 4>(weight, x, m, y, stream);
  }
}

}  // namespace

cudaError_t BinaryProduct(const BinaryWeight& weight, const void* x, int64_t m, Type type, void* y,
                          cudaStream_t stream) {
  return type == Type::kBfloat16 ? Launch<__nv_bfloat16>(weight, x, m, y, stream)
                                 : Launch<__half>(weight, x, m, y, stream);
}

}  // namespace any4
