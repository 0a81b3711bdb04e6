// A warp multiplies 16 rows of W with up to 8 rows of x on tensor cores. Bits become -1 and +1 of x's dtype, two of them
// by a shift and one logical operation, since the sign of a float is a bit; products and sums of a tile are then exact
// up to float32, and scales multiply the sums.
#include "binary_product.h"
#include "fragment.cuh"

namespace any4 {
namespace {

constexpr int kWarps = 8;
constexpr int kRows = 16;

// The bits of two ones in a register.
template <typename T>
constexpr uint32_t kOnes = 0;
template <>
constexpr uint32_t kOnes<__nv_bfloat16> = 0x3F803F80;
template <>
constexpr uint32_t kOnes<__half> = 0x3C003C00;

// +1 where bits 15 and 31 are set, else -1.
template <typename T>
__device__ __forceinline__ uint32_t Signs(uint32_t bits) {
  return (bits & 0x80008000u) ^ (kOnes<T> | 0x80008000u);
}

__device__ __forceinline__ void Put(__nv_bfloat16* to, float value) { *to = __float2bfloat16(value); }
__device__ __forceinline__ void Put(__half* to, float value) { *to = __float2half(value); }

__device__ __forceinline__ float At(const void* bfloat16, int64_t i) {
  return __bfloat162float(static_cast<const __nv_bfloat16*>(bfloat16)[i]);
}

// Lane 4 g + t has the words t of rows g and g + 8 in a tile: its inputs of step s are bits s, s + 16, s + 8 and s + 24
// of them. The order of inputs is x's too, so that products don't depend on it.
template <typename T>
__global__ void __launch_bounds__(32 * kWarps) Multiply(const BinaryWeight w, const uint4* __restrict__ x, int m,
                                                        T* __restrict__ y) {
  __shared__ float totals[kWarps][128];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int64_t first = int64_t{blockIdx.x} * kRows;
  // Where too few rows are left, the last is repeated, and the surplus is never stored.
  const int64_t rows[2] = {min(first + g, w.n - 1), min(first + g + 8, w.n - 1)};
  float total[4] = {};
  for (int64_t tile = warp; tile < w.k / kBinaryTile; tile += kWarps) {
    uint4 values[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = g < m ? x[((tile * 4 + i) * m + g) * 4 + t] : make_uint4(0, 0, 0, 0);
    const int64_t group = tile / w.group_tiles;
    float shift[2] = {};
    for (int p = 0; p < w.count; ++p) {
      const BinaryPlane& plane = w.planes[p];
      const uint32_t low = plane.codes[rows[0] * (w.k / 32) + tile * 4 + t];
      const uint32_t high = plane.codes[rows[1] * (w.k / 32) + tile * 4 + t];
      float sum[4] = {};
#pragma unroll
      for (int step = 0; step < 8; ++step) {
        const uint4& of_x = values[step / 2];
        TensorProduct<T>(sum, Signs<T>(low << (15 - step)), Signs<T>(high << (15 - step)), Signs<T>(low << (7 - step)),
                         Signs<T>(high << (7 - step)), step % 2 ? of_x.z : of_x.x, step % 2 ? of_x.w : of_x.y);
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        // The table is its middle -+ half its step.
        const float least = At(plane.lut, rows[i] * plane.lut_stride), most = At(plane.lut, rows[i] * plane.lut_stride + 1);
        const int64_t at = rows[i] * w.groups + group;
        const float scale = At(plane.scales, at), half = scale * ((most - least) / 2);
        total[2 * i] += half * sum[2 * i];
        total[2 * i + 1] += half * sum[2 * i + 1];
        shift[i] += scale * ((most + least) / 2) + (plane.offsets != nullptr ? At(plane.offsets, at) : 0);
      }
    }
    if (!__any_sync(0xffffffffu, shift[0] != 0 || shift[1] != 0)) continue;
    float sum[4] = {};
#pragma unroll
    for (int step = 0; step < 8; ++step) {
      const uint4& of_x = values[step / 2];
      TensorProduct<T>(sum, kOnes<T>, kOnes<T>, kOnes<T>, kOnes<T>, step % 2 ? of_x.z : of_x.x,
                       step % 2 ? of_x.w : of_x.y);
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) total[i] += shift[i / 2] * sum[i];
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) totals[warp][4 * lane + i] = total[i];
  __syncthreads();
  if (threadIdx.x >= 128) return;
  float result = 0;
  for (int i = 0; i < kWarps; ++i) result += totals[i][threadIdx.x];
  const int owner = threadIdx.x / 4, part = threadIdx.x % 4;
  const int64_t row = first + owner / 4 + part / 2 * 8;
  const int column = owner % 4 * 2 + part % 2;
  if (row < w.n && column < m) Put(y + column * w.n + row, result);
}

template <typename T>
cudaError_t Launch(const BinaryWeight& weight, const void* x, int64_t m, void* y, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((weight.n + kRows - 1) / kRows);
  Multiply<T><<<blocks, 32 * kWarps, 0, stream>>>(weight, static_cast<const uint4*>(x), static_cast<int>(m),
                                                  static_cast<T*>(y));
  return cudaGetLastError();
}

}  // namespace

cudaError_t BinaryProduct(const BinaryWeight& weight, const void* x, int64_t m, Type type, void* y,
                          cudaStream_t stream) {
  return type == Type::kBfloat16 ? Launch<__nv_bfloat16>(weight, x, m, y, stream)
                                 : Launch<__half>(weight, x, m, y, stream);
}

}  // namespace any4
