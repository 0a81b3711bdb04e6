// BinaryTurns: the product with one or two rows of x by a sum of binary planes, on tensor cores.
//
// A block takes 16 rows of W, whose warps split the inputs 512 by 512. Lane 4 g + t has 128 inputs of rows g and g + 8 in
// each plane, 16 bytes as they are stored: from 128 t on. Its four words are multiplied one after the other. The eight
// columns of a tensor core's product are the four lanes' inputs, for each of two rows of x: so each column has one scale.
//
// Bits become numbers of x's type that differ by 2, two of them by one logical operation, since a register is two
// halves of 16 bits. The lower eight bits of a half go to the mantissa, where a bit is worth 2 beside a power of two, or
// to the exponent's lowest place, and the upper eight to the sign:
//
//   bit of a half   0   1   2   3   4   5   6   7   8 to 15
//   if clear       16   8   4   2  16   8   4   2     -1
//   if set         18  10   6   4  18  10   6   4     +1
//
// What the lower ones have too much, 17 times an input and so on, is the same for all rows of W, and is subtracted first.
#pragma once

#include "binary_product.h"
#include "fragment.cuh"
#include "mask.cuh"

namespace any4 {

constexpr int kBinaryWarps = 8, kBinaryRows = 16;
constexpr int kBinaryInputs = 2;              // the most rows of x in a block
constexpr int kBinaryTurn = 4 * kBinaryTile;   // inputs

// The inputs of a row that whole turns have, and what a block holds of x: for each row pairs of inputs in the order of
// steps, then for each 128 inputs what is subtracted, and their sum; and zeros.
__host__ __device__ constexpr int64_t BinaryPadded(int64_t k) { return (k + kBinaryTurn - 1) / kBinaryTurn * kBinaryTurn; }
__host__ __device__ constexpr int64_t BinaryBytes(int64_t k, int64_t rows) {
  return rows * (BinaryPadded(k) * 2 + BinaryPadded(k) / kBinaryTile * 8) + 256;
}

// Where a type's exponent begins.
template <typename T>
constexpr int kExponent = 0;
template <>
constexpr int kExponent<__nv_bfloat16> = 7;
template <>
constexpr int kExponent<__half> = 10;

__device__ __forceinline__ float Wide(uint32_t word, bool upper, __nv_bfloat16) {
  return __uint_as_float(upper ? word & 0xFFFF0000u : word << 16);
}
__device__ __forceinline__ float Wide(uint32_t word, bool upper, __half) {
  return __half2float(__ushort_as_half(static_cast<uint16_t>(upper ? word >> 16 : word)));
}
__device__ __forceinline__ void Put(__nv_bfloat16* to, float value) { *to = __float2bfloat16(value); }
__device__ __forceinline__ void Put(__half* to, float value) { *to = __float2half(value); }

// What lies `bytes` after an address; 32 bits for the distance save the additions that 64 take.
template <typename T>
__device__ __forceinline__ T LoadAt(const void* from, uint32_t bytes) {
  return __ldg(reinterpret_cast<const T*>(static_cast<const uint8_t*>(from) + bytes));
}

__device__ __forceinline__ float FloatAt(const void* bfloat16, uint32_t i) {
  return __uint_as_float(uint32_t{LoadAt<uint16_t>(bfloat16, 2 * i)} << 16);
}

// Brings a row of x to shared memory: of each 32 inputs, for step s inputs s and s + 16, then s + 8 and s + 24.
template <typename T>
__device__ __forceinline__ void StageInputs(const T* x, int64_t k, uint4* pairs, float* less, float* sums) {
  const int lane = threadIdx.x % 32, words = static_cast<int>(BinaryPadded(k) / 32);
  // All lanes of a warp go on as long as one of them has a word.
  for (int word = threadIdx.x; word - lane < words; word += 32 * kBinaryWarps) {
    uint4 raw[4] = {};
    if (word * 32 < k) {
#pragma unroll
      for (int i = 0; i < 4; ++i) raw[i] = __ldg(reinterpret_cast<const uint4*>(x + word * 32) + i);
    }
    const uint32_t two[16] = {raw[0].x, raw[0].y, raw[0].z, raw[0].w, raw[1].x, raw[1].y, raw[1].z, raw[1].w,
                              raw[2].x, raw[2].y, raw[2].z, raw[2].w, raw[3].x, raw[3].y, raw[3].z, raw[3].w};
    float excess = 0, sum = 0;
    uint32_t out[16];
#pragma unroll
    for (int s = 0; s < 8; ++s) {
#pragma unroll
      for (int upper = 0; upper < 2; ++upper) {
        const uint32_t pair = Permute(two[s / 2 + 4 * upper], two[s / 2 + 4 * upper + 8], s % 2 ? 0x7632 : 0x5410);
        const float both = Wide(pair, false, T()) + Wide(pair, true, T());
        out[2 * s + upper] = pair;
        sum += both;
        if (upper == 0) excess = fmaf(static_cast<float>((16 >> s % 4) + 1), both, excess);
      }
    }
    const bool held = word < words;
#pragma unroll
    for (int i = 0; held && i < 4; ++i) pairs[4 * word + i] = make_uint4(out[4 * i], out[4 * i + 1], out[4 * i + 2], out[4 * i + 3]);
    // Four neighbouring threads have the words of one lane.
#pragma unroll
    for (int lanes = 1; lanes < 4; lanes *= 2) {
      excess += __shfl_xor_sync(~0u, excess, lanes);
      sum += __shfl_xor_sync(~0u, sum, lanes);
    }
    if (held && word % 4 == 0) less[word / 4] = -excess, sums[word / 4] = sum;
  }
}

template <typename T, int kPlanes>
__global__ void __launch_bounds__(32 * kBinaryWarps, 2)
    BinaryTurns(const __grid_constant__ BinaryWeight w, const T* __restrict__ x, int m, int inputs,
                T* __restrict__ y) {
  constexpr int kPlace = kExponent<T>;
  extern __shared__ __align__(16) unsigned char shared[];
  // Half the step of each row's table, and its middle.
  __shared__ float2 tables[kPlanes][kBinaryRows];
  __shared__ float kept[kBinaryWarps][kBinaryInputs][kBinaryRows];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int64_t first = int64_t{blockIdx.x} * kBinaryRows;
  const int first_m = blockIdx.y * inputs, rows_of_x = min(m - first_m, inputs);
  const int padded = static_cast<int>(BinaryPadded(w.k)), turns = padded / kBinaryTurn, units = padded / kBinaryTile;
  // Where too few rows are left, the last is repeated, and the surplus is never stored.
  const auto row = [&](int r) { return static_cast<uint32_t>(min(first + g + 8 * r, w.n - 1)); };
  const auto row_bytes = static_cast<uint32_t>(w.k / 8), groups = static_cast<uint32_t>(w.groups);
  const uint32_t codes[2] = {row(0) * row_bytes, row(1) * row_bytes};
  const uint32_t scales[2] = {row(0) * groups, row(1) * groups};
  uint4 words[kPlanes][2] = {};
  const auto load = [&](int turn, int p) {
    const uint32_t byte = turn * (kBinaryTurn / 8) + 16 * t;
    if (turn >= turns || byte >= row_bytes) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) words[p][r] = LoadAt<uint4>(w.planes[p].codes, codes[r] + byte);
  };
#pragma unroll
  for (int p = 0; p < kPlanes; ++p) load(warp, p);

  auto* const pairs = reinterpret_cast<uint4*>(shared);
  auto* const less = reinterpret_cast<float*>(shared + rows_of_x * padded * 2);
  float* const sums = less + rows_of_x * units;
  auto* const zeros = reinterpret_cast<uint4*>(sums + rows_of_x * units);
  if (threadIdx.x < kPlanes * kBinaryRows) {
    const int p = threadIdx.x / kBinaryRows, of_w = threadIdx.x % kBinaryRows;
    const uint32_t at = w.planes[p].own_tables ? 2 * static_cast<uint32_t>(min(first + of_w, w.n - 1)) : 0;
    const float least = FloatAt(w.planes[p].lut, at), most = FloatAt(w.planes[p].lut, at + 1);
    tables[p][of_w] = make_float2((most - least) / 2, (most + least) / 2);
  }
  if (threadIdx.x < 16) zeros[threadIdx.x] = make_uint4(0, 0, 0, 0);
  for (int r = 0; r < rows_of_x; ++r) {
    StageInputs(x + (first_m + r) * w.k, w.k, pairs + r * (padded / 8), less + r * units, sums + r * units);
  }
  __syncthreads();

  // Column g is of row g / 4 of x, and of the lanes t = g % 4, which alone have other than zeros.
  const bool owns = t == g % 4 && g / 4 < rows_of_x;
  const uint4* const own = owns ? pairs + g / 4 * (padded / 8) + 16 * t : zeros;
  const int own_turn = owns ? kBinaryTurn / 8 : 0;
  // This lane's sums are of columns 2 t and 2 t + 1.
  const int of_x = min(t / 2, rows_of_x - 1), side = 2 * (t % 2);
  const uint32_t signs = InRegister(0x80008000u);
  uint32_t places[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) places[i] = InRegister(0x00010001u << (kPlace - 3 + i));
  float total[2] = {};
  for (int turn = warp; turn < turns; turn += kBinaryWarps) {
    const int unit = 4 * turn + side;
    const float start[2] = {less[of_x * units + unit], less[of_x * units + unit + 1]};
    const float of_unit[2] = {sums[of_x * units + unit], sums[of_x * units + unit + 1]};
    const uint32_t group[2] = {min(static_cast<uint32_t>(unit) >> w.group_shift, groups - 1),
                               min(static_cast<uint32_t>(unit + 1) >> w.group_shift, groups - 1)};
    uint16_t scale[kPlanes][2][2];
#pragma unroll
    for (int i = 0; i < 4 * kPlanes; ++i) {
      scale[i / 4][i / 2 % 2][i % 2] = LoadAt<uint16_t>(w.planes[i / 4].scales, 2 * (scales[i / 2 % 2] + group[i % 2]));
    }
    float sum[kPlanes][4];
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) sum[p][0] = sum[p][2] = start[0], sum[p][1] = sum[p][3] = start[1];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint4 v[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i] = own[own_turn * turn + 4 * j + i];
#pragma unroll
      for (int p = 0; p < kPlanes; ++p) {
        const auto word = [&](int r) {
          const uint4& four = words[p][r];
          return j == 0 ? four.x : j == 1 ? four.y : j == 2 ? four.z : four.w;
        };
        const uint32_t top = word(0), bottom = word(1);
        const auto low = [&](uint32_t bits, int s) {
          return MaskAndSet(bits << (s < 4 ? kPlace - 3 : kPlace - 7), places[s % 4],
                            (0x4000u + (static_cast<uint32_t>(3 - s % 4) << kPlace)) * 0x10001u);
        };
        const auto high = [&](uint32_t bits, int s) {
          return MaskAndFlip(bits << (7 - s), signs, (std::is_same_v<T, __half> ? 0xBC00u : 0xBF80u) * 0x10001u);
        };
#pragma unroll
        for (int s = 0; s < 8; ++s) {
          TensorProduct<T>(sum[p], low(top, s), low(bottom, s), high(top, s), high(bottom, s),
                           s % 2 == 0 ? v[s / 2].x : v[s / 2].z, s % 2 == 0 ? v[s / 2].y : v[s / 2].w);
        }
        if (j == 3) load(turn + kBinaryWarps, p);
      }
    }
#pragma unroll
    for (int p = 0; p < kPlanes; ++p) {
      const BinaryPlane& plane = w.planes[p];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float2 table = tables[p][g + 8 * r];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const float part = fmaf(table.x, sum[p][2 * r + i], table.y * of_unit[i]);
          total[r] = fmaf(__uint_as_float(uint32_t{scale[p][r][i]} << 16), part, total[r]);
          if (plane.offsets != nullptr) total[r] = fmaf(FloatAt(plane.offsets, scales[r] + group[i]), of_unit[i], total[r]);
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float sum = total[r] + __shfl_xor_sync(~0u, total[r], 1);
    if (t % 2 == 0) kept[warp][t / 2][g + 8 * r] = sum;
  }
  __syncthreads();
  const int of_w = threadIdx.x % kBinaryRows, column = threadIdx.x / kBinaryRows;
  if (column >= rows_of_x || first + of_w >= w.n) return;
  float result = 0;
#pragma unroll
  for (int i = 0; i < kBinaryWarps; ++i) result += kept[i][column][of_w];
  Put(y + (first_m + column) * w.n + first + of_w, result);
}

}  // namespace any4
