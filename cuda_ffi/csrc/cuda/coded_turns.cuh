// CodedTurns: the product with one row of x by a weight of 3-bit codes whose scales are coded too.
//
// A block takes kTiles tiles of 16 rows of W, whose warps split the inputs 128 by 128, which are 8 groups. The eight
// columns of a tensor core's product are these groups: lane 4 g + t decodes inputs 32 t to 32 t + 31 of rows g and g + 8,
// and has the sums of groups 2 t and 2 t + 1, which it multiplies by their scales.
//
// Codes of scales lie along the rows of W, so that the 128 inputs' are short pieces of many lines of memory; a warp
// copies those of all its rows to shared memory, one turn ahead.
#pragma once

#include <cuda_pipeline_primitives.h>

#include "coded_product.h"
#include "entries.cuh"
#include "lut_tile.cuh"
#include "mask.cuh"

namespace any4 {

constexpr int kCodedWarps = 16, kGroups = kCodedInputs / kCodedGroup;

// A ramp's codes become bfloat16 by their place in the mantissa of a power of two, which is then subtracted. A word of
// the low plane has 16 codes; inputs i and i + 8 are at the same place of its halves, and are the two of a register.
struct Ramp {
  float first, step;
  uint32_t threes;  // 0x00030003

  __device__ __forceinline__ void Load(const LutWeight& w, int64_t) {
    threes = InRegister(0x00030003u);
    const uint32_t pair = TablePair<__nv_bfloat16>(w, 0, 0);
    first = __uint_as_float(pair << 16);
    step = __uint_as_float(pair & 0xFFFF0000u) - first;
  }

  // Registers i hold inputs i and i + 8 of the 16.
  __device__ __forceinline__ void Decode(const uint32_t (&words)[3], int half, uint32_t (&out)[8]) const {
    const uint32_t high = Permute(words[2], 0, half == 0 ? 0x4140 : 0x4342);
    const auto place = [&](int i, int p, uint32_t low, uint32_t high_of) {
      // A mantissa of seven bits, of which code * 2^p are some: 2^(7 - p) + code.
      const uint32_t power = (0x4300u - 0x80u * p) * 0x10001u;
      const uint32_t bits = MaskAndSet(high_of, 0x00040004u << p, MaskAndSet(low, threes << p, power));
      const uint32_t less = power | 0x80008000u;
      const __nv_bfloat162 value =
          __hadd2(reinterpret_cast<const __nv_bfloat162&>(bits), reinterpret_cast<const __nv_bfloat162&>(less));
      out[i] = reinterpret_cast<const uint32_t&>(value);
    };
    const uint32_t low = words[half], low6 = low >> 6, low12 = low >> 12, high4 = high >> 4;
    place(0, 0, low, high << 2);
    place(1, 2, low, high << 3);
    place(2, 4, low, high << 4);
    place(3, 0, low6, high >> 1);
    place(4, 2, low6, high);
    place(5, 4, low6, high << 1);
    place(6, 0, low12, high4);
    place(7, 2, low12, high4 << 1);
  }

  // The order in which registers of x follow a row of 16.
  static __device__ __forceinline__ void Arrange(const uint4& a, const uint4& b, uint32_t (&out)[8]) {
    const uint32_t first[4] = {a.x, a.y, a.z, a.w}, last[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) out[i] = Permute(first[i / 2], last[i / 2], i % 2 ? 0x7632 : 0x5410);
  }

  // The sum of a group, from that of the codes times x and that of x.
  __device__ __forceinline__ float Sum(float part, float inputs) const { return fmaf(step, part, first * inputs); }
};

// Any table: entries are looked up.
struct Table {
  Decoder<__nv_bfloat16, 3> table;

  __device__ __forceinline__ void Load(const LutWeight& w, int64_t row) { table.Load(w, row); }

  // Registers i hold inputs 2 i and 2 i + 1 of the 16.
  __device__ __forceinline__ void Decode(const uint32_t (&words)[3], int half, uint32_t (&out)[8]) const {
#pragma unroll
    for (int eighth = 0; eighth < 2; ++eighth) {
      uint32_t four[4];
      table.Decode(words, 2 * half + eighth, four);
#pragma unroll
      for (int i = 0; i < 4; ++i) out[4 * eighth + i] = four[i];
    }
  }

  static __device__ __forceinline__ void Arrange(const uint4& a, const uint4& b, uint32_t (&out)[8]) {
    out[0] = a.x, out[1] = a.y, out[2] = a.z, out[3] = a.w;
    out[4] = b.x, out[5] = b.y, out[6] = b.z, out[7] = b.w;
  }

  __device__ __forceinline__ float Sum(float part, float) const { return part; }
};

// Scales [0] and offsets [1] of 8 groups and the rows of a block, as they are stored.
template <int kTiles>
struct CodedTurn {
  uint32_t low[2][kGroups][kTiles];
  uint16_t high[2][kGroups][kTiles];
  uint16_t ranges[2][2][kGroups][kTiles];  // the ranges' scales and offsets
};

// The ramp of a coded matrix.
struct Levels {
  float first, step;
  uint32_t threes = InRegister(0x00030003u);

  __device__ __forceinline__ explicit Levels(const CodedScales& of) {
    const uint32_t pair = of.low == nullptr ? 0 : __ldg(static_cast<const uint32_t*>(of.lut));
    first = __uint_as_float(pair << 16);
    step = __uint_as_float(pair & 0xFFFF0000u) - first;
  }

  // What the codes of rows g and g + 8 of a tile stand for, of one group.
  template <int kTiles>
  __device__ __forceinline__ void Values(const CodedTurn<kTiles>& turn, int which, int group, int tile, int g,
                                         float (&out)[2]) const {
    // As float16, 0x6400 + c is 1024 + c.
    const uint32_t low = turn.low[which][group][tile] >> (2 * g), high = (turn.high[which][group][tile] << 2) >> g;
    const uint32_t bits = MaskAndSet(Permute(high, 0, 0x4140), 0x00040004u, MaskAndSet(low, threes, 0x64006400u));
    const __half2 codes = __hadd2(reinterpret_cast<const __half2&>(bits), __float2half2_rn(-1024.0f));
    const float scale = __uint_as_float(uint32_t{turn.ranges[which][0][group][tile]} << 16);
    const float offset = __uint_as_float(uint32_t{turn.ranges[which][1][group][tile]} << 16);
    const float by = scale * step, from = fmaf(scale, first, offset);
    out[0] = fmaf(__low2float(codes), by, from);
    out[1] = fmaf(__high2float(codes), by, from);
  }
};

// The block's grid is (row tiles, rows of x); it has kCodedWarps warps.
template <typename Codes, int kTiles>
__global__ void __launch_bounds__(32 * kCodedWarps, 1)
    CodedTurns(const __grid_constant__ CodedWeight weight, const __nv_bfloat16* __restrict__ x,
               __nv_bfloat16* __restrict__ y) {
  constexpr int kRows = kTiles * kTileRows;
  __shared__ __align__(16) CodedTurn<kTiles> memory[kCodedWarps][2];
  __shared__ float kept[kCodedWarps][kRows], of_entries[kRows];
  const LutWeight& w = weight.codes;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int64_t first_row = int64_t{blockIdx.x} * kRows, n = w.n, k = w.k;
  x += blockIdx.y * k;
  const int turns = static_cast<int>(k / kCodedInputs);

  // A lane copies one piece of a plane and one of the ranges, of one group's scales or offsets.
  const auto copy = [&](int turn, int stage) {
    const int group = lane % kGroups, which = lane / kGroups % 2, second = lane / (2 * kGroups);
    const CodedScales& of = which == 0 ? weight.scales : weight.offsets;
    if (turn < turns && of.low != nullptr) {
      auto& to = memory[warp][stage];
      const int64_t at = static_cast<int64_t>(turn) * kGroups + group;
      if (second == 0) {
        __pipeline_memcpy_async(to.low[which][group], of.low + (at * n + first_row) / 4, 4 * kTiles);
      } else {
        __pipeline_memcpy_async(to.high[which][group], of.high + (at * n + first_row) / 8, 2 * kTiles);
      }
      const void* ranges = second == 0 ? of.scales : of.offsets;
      __pipeline_memcpy_async(to.ranges[which][second][group],
                              static_cast<const uint16_t*>(ranges) + (at * n + first_row) / kCodedRun, 2 * kTiles);
    }
    __pipeline_commit();
  };
  uint32_t words[kTiles][2][3] = {};
  const auto load = [&](int turn, int tile) {
    if (turn >= turns) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      LoadCodes<3>(w, first_row + tile * kTileRows + g + 8 * r, static_cast<int64_t>(turn) * kCodedInputs + 32 * t,
                   words[tile][r]);
    }
  };
  // Column g is group g, whose inputs are with lanes t = g / 2, and zeros with the others.
  uint4 next_x[2] = {};
  const bool owns = t == g / 2;
  const auto load_x = [&](int turn) {
    if (!owns || turn >= turns) return;
    const auto* from = reinterpret_cast<const uint4*>(x + static_cast<int64_t>(turn) * kCodedInputs + kCodedGroup * g);
    next_x[0] = __ldg(from);
    next_x[1] = __ldg(from + 1);
  };

  const auto add_entries = [&] {
    for (int at = threadIdx.x / kRowLanes; at < kRows; at += 32 * kCodedWarps / kRowLanes) {
      float sum[1] = {};
      if (weight.entries.values != nullptr) SumEntries(weight.entries, first_row + at, x, 0, sum);
      if (threadIdx.x % kRowLanes == 0) of_entries[at] = sum[0];
    }
  };

  copy(warp, 0);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) load(warp, tile);
  load_x(warp);
  const Levels of_scales(weight.scales), of_offsets(weight.offsets);
  Codes codes[kTiles][2];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int r = 0; r < 2; ++r) codes[tile][r].Load(w, first_row + tile * kTileRows + g + 8 * r);
  }
  // Half of the warps take the entries before and half after the rest, so that one half computes while the other waits.
  if (warp % 2 == 0) add_entries();

  float totals[kTiles][2] = {};
  int stage = 0;
  for (int turn = warp; turn < turns; turn += kCodedWarps, stage ^= 1) {
    copy(turn + kCodedWarps, stage ^ 1);
    uint32_t own[8], values[2][8];
    Codes::Arrange(next_x[0], next_x[1], own);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      values[0][i] = g % 2 == 0 ? own[i] : 0;
      values[1][i] = g % 2 == 1 ? own[i] : 0;
    }
    load_x(turn + kCodedWarps);
    float inputs[4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int i = 0; i < 8; i += 2) AddInputs<__nv_bfloat16>(inputs, values[half][i], values[half][i + 1]);
    }
    __pipeline_wait_prior(1);
    __syncwarp();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      float part[4] = {};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t top[8], bottom[8];
        codes[tile][0].Decode(words[tile][0], half, top);
        codes[tile][1].Decode(words[tile][1], half, bottom);
#pragma unroll
        for (int i = 0; i < 8; i += 2) {
          TensorProduct<__nv_bfloat16>(part, top[i], bottom[i], top[i + 1], bottom[i + 1], values[half][i],
                                       values[half][i + 1]);
        }
      }
      load(turn + kCodedWarps, tile);
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        float scale[2];
        of_scales.Values(memory[warp][stage], 0, 2 * t + side, tile, g, scale);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          totals[tile][r] = fmaf(scale[r], codes[tile][r].Sum(part[2 * r + side], inputs[side]), totals[tile][r]);
        }
        if (weight.offsets.low != nullptr) {
          float offset[2];
          of_offsets.Values(memory[warp][stage], 1, 2 * t + side, tile, g, offset);
#pragma unroll
          for (int r = 0; r < 2; ++r) totals[tile][r] = fmaf(offset[r], inputs[side], totals[tile][r]);
        }
      }
    }
    // The copies of the next turn go where this one was read.
    __syncwarp();
  }
  if (warp % 2 == 1) add_entries();
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float sum = totals[tile][r];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      if (t == 0) kept[warp][tile * kTileRows + 8 * r + g] = sum;
    }
  }
  __syncthreads();
  if (threadIdx.x >= kRows) return;
  float total = of_entries[threadIdx.x];
#pragma unroll
  for (int i = 0; i < kCodedWarps; ++i) total += kept[i][threadIdx.x];
  y[blockIdx.y * n + first_row + threadIdx.x] = __float2bfloat16(total);
}

}  // namespace any4
