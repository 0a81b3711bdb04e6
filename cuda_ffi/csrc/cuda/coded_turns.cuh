// CodedTurns: the product with one row of x by a weight of 3-bit codes whose scales are coded too.
//
// A block takes kTiles tiles of 16 rows of W, whose warps split the inputs 128 by 128, which are 8 groups. The eight
// columns of a tensor core's product are these groups: lane 4 g + t decodes inputs 32 t to 32 t + 31 of rows g and g + 8,
// and has the sums of groups 2 t and 2 t + 1, which it multiplies by their scales.
//
//   global memory   codes            codes of scales,         x                     entries
//                     |              their ranges             |                       |
//   load              | a turn         | a turn ahead         | once                  |
//                     | ahead          v                      v                       |
//   shared memory     |              CodedTurn              arranged x, sums of       |
//                     v                |                    its groups                |
//   registers       words              | factors of ranges    |      |                |
//                     |                v                      |      |                |
//   decode            v              scales, offsets          v      |                v
//   multiply        values ------------|-------> mma <------ x       |       sum of a row's, by
//                                      v          |                  |       eight lanes
//   scale                             fma <-------+------------------+                |
//                                      |                                              |
//   add                                +----------> all warps <-----------------------+
//
// Codes of scales lie along the rows of W, so that those of 128 inputs are short pieces of many lines of memory.
#pragma once

#include <cuda_pipeline_primitives.h>

#include "coded_decode.cuh"
#include "entries.cuh"
#include "lut_tile.cuh"

namespace any4 {

constexpr int kCodedWarps = 16, kGroups = kCodedInputs / kCodedGroup;

// Scales [0] and offsets [1] of 8 groups and the rows of a block, as they are stored.
template <int kTiles>
struct CodedTurn {
  uint32_t low[2][kGroups][kTiles];
  uint16_t high[2][kGroups][kTiles];
  uint16_t ranges[2][2][kGroups][kTiles];  // the ranges' scales and offsets
};

// What a block holds of x: of each group its inputs, what sums begin with, and the sum of the inputs; and zeros.
__host__ __device__ constexpr int64_t CodedBytes(int64_t k) { return k * 2 + k / kCodedGroup * 8 + 32; }

// The grid is (blocks of rows, rows of x).
template <typename Codes, int kTiles>
__global__ void __launch_bounds__(32 * kCodedWarps, 1)
    CodedTurns(const __grid_constant__ CodedWeight weight, const __nv_bfloat16* __restrict__ x,
               __nv_bfloat16* __restrict__ y) {
  constexpr int kRows = kTiles * kTileRows, kFactors = 2 * kGroups * kTiles;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ __align__(16) CodedTurn<kTiles> memory[kCodedWarps][2];
  // After the last turn these are the warps' sums.
  __shared__ __align__(16) float2 factors[kCodedWarps][2][kGroups][kTiles];
  __shared__ float of_entries[kRows];
  static_assert(sizeof factors[0] >= kRows * sizeof(float));
  const LutWeight& w = weight.codes;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  const int64_t n = w.n;
  const uint32_t first_row = blockIdx.x * kRows;
  const int k = static_cast<int>(w.k), turns = k / kCodedInputs, groups = k / kCodedGroup;
  x += blockIdx.y * w.k;

  // A lane copies one piece of a plane and one of the ranges, of one group's scales or offsets.
  const auto copy = [&](int turn, int stage) {
    const int group = lane % kGroups, which = lane / kGroups % 2, second = lane / (2 * kGroups);
    const CodedScales& of = which == 0 ? weight.scales : weight.offsets;
    if (turn < turns && of.low != nullptr) {
      auto& to = memory[warp][stage];
      const uint32_t at = static_cast<uint32_t>(turn * kGroups + group) * static_cast<uint32_t>(n) + first_row;
      if (second == 0) {
        __pipeline_memcpy_async(to.low[which][group], of.low + at / 4, 4 * kTiles);
      } else {
        __pipeline_memcpy_async(to.high[which][group], of.high + at / 8, 2 * kTiles);
      }
      const void* ranges = second == 0 ? of.scales : of.offsets;
      __pipeline_memcpy_async(to.ranges[which][second][group], static_cast<const uint16_t*>(ranges) + at / kCodedRun,
                              2 * kTiles);
    }
    __pipeline_commit();
  };
  uint32_t words[kTiles][2][3] = {};
  // Other rows and turns are addressed by their distance, in 32 bits, from the lane's first.
  const uint8_t* const low = w.codes + int64_t{first_row + g} * (k / 4) + 8 * t;
  const uint8_t* const high = w.high + int64_t{first_row + g} * (k / 8) + 4 * t;
  const auto load = [&](int turn, int tile) {
    if (turn >= turns) return;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const auto distance = static_cast<uint32_t>((tile * kTileRows + 8 * r) * (k / 8) + turn * (kCodedInputs / 8));
      const uint2 two = __ldg(reinterpret_cast<const uint2*>(low + 2 * distance));
      words[tile][r][0] = two.x, words[tile][r][1] = two.y;
      words[tile][r][2] = __ldg(reinterpret_cast<const uint32_t*>(high + distance));
    }
  };
  copy(warp, 0);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) load(warp, tile);

  auto* const inputs = reinterpret_cast<uint4*>(shared);
  auto* const starts = reinterpret_cast<float*>(shared + 2 * k);
  float* const sums = starts + groups;
  auto* const zeros = reinterpret_cast<uint4*>(sums + groups);
  const typename Codes::Sums of_codes(w);
  if (threadIdx.x < 2) zeros[threadIdx.x] = make_uint4(0, 0, 0, 0);
  for (int group = threadIdx.x; group < groups; group += 32 * kCodedWarps) {
    const auto* from = reinterpret_cast<const uint4*>(x + group * kCodedGroup);
    const uint4 a = __ldg(from), b = __ldg(from + 1);
    const uint32_t raw[8] = {a.x, a.y, a.z, a.w, b.x, b.y, b.z, b.w};
    uint32_t out[8];
    Codes::Arrange(raw, out);
    float sum = 0, powers = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float both = __uint_as_float(out[i] << 16) + __uint_as_float(out[i] & 0xFFFF0000u);
      sum += both;
      powers = fmaf(static_cast<float>(128 >> Codes::Place(i)), both, powers);
    }
    inputs[2 * group] = make_uint4(out[0], out[1], out[2], out[3]);
    inputs[2 * group + 1] = make_uint4(out[4], out[5], out[6], out[7]);
    starts[group] = of_codes.Start(sum, powers);
    sums[group] = sum;
  }
  const Levels of_scales(weight.scales), of_offsets(weight.offsets);
  Codes codes[kTiles][2];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int r = 0; r < 2; ++r) codes[tile][r].Load(w, first_row + tile * kTileRows + g + 8 * r);
  }
  __syncthreads();

  const auto add_entries = [&] {
    const auto input = [&](int, uint32_t column) {
      return __bfloat162float(*reinterpret_cast<const __nv_bfloat16*>(shared + Codes::Offset(column)));
    };
    for (int at = threadIdx.x / kRowLanes; at < kRows; at += 32 * kCodedWarps / kRowLanes) {
      float sum[1] = {};
      if (weight.entries.values != nullptr) SumEntries(weight.entries, first_row + at, input, sum);
      if (threadIdx.x % kRowLanes == 0) of_entries[at] = sum[0];
    }
  };
  // Half of the warps take the entries before and half after the rest, so that one half computes while the other waits.
  if (warp % 2 == 0) add_entries();

  // Column g is group g, whose inputs are with lanes t = g / 2, in one half of theirs; all else is zero.
  const uint4* own[2];
  int own_turn[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const bool owns = t == g / 2 && g % 2 == half;
    own[half] = owns ? inputs + 2 * g : zeros;
    own_turn[half] = owns ? 2 * kGroups : 0;
  }
  const uint32_t threes = InRegister(0x00030003u);
  float totals[kTiles][2] = {};
  int stage = 0;
  for (int turn = warp; turn < turns; turn += kCodedWarps, stage ^= 1) {
    copy(turn + kCodedWarps, stage ^ 1);
    __pipeline_wait_prior(1);
    __syncwarp();
    const CodedTurn<kTiles>& coded = memory[warp][stage];
#pragma unroll
    for (int i = lane; i < kFactors; i += 32) {
      const int tile = i % kTiles, group = i / kTiles % kGroups, which = i / kTiles / kGroups;
      const uint16_t scale = coded.ranges[which][0][group][tile], offset = coded.ranges[which][1][group][tile];
      factors[warp][which][group][tile] = which == 0 ? of_scales.Factors(scale, offset, of_codes.step)
                                                     : of_offsets.Factors(scale, offset, 1);
    }
    uint4 v[2][2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      v[half][0] = own[half][turn * own_turn[half]];
      v[half][1] = own[half][turn * own_turn[half] + 1];
    }
    const float2 start = reinterpret_cast<const float2*>(starts)[turn * (kGroups / 2) + t];
    const float2 sum = reinterpret_cast<const float2*>(sums)[turn * (kGroups / 2) + t];
    __syncwarp();
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      // Each half of the inputs has its own columns: the even ones, then the odd ones.
      float part[2][4] = {{start.x, 0, start.x, 0}, {0, start.y, 0, start.y}};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        uint32_t top[8], bottom[8];
        codes[tile][0].Decode(words[tile][0], half, top);
        codes[tile][1].Decode(words[tile][1], half, bottom);
        const uint4 &a = v[half][0], &b = v[half][1];
        TensorProduct<__nv_bfloat16>(part[half], top[0], bottom[0], top[1], bottom[1], a.x, a.y);
        TensorProduct<__nv_bfloat16>(part[half], top[2], bottom[2], top[3], bottom[3], a.z, a.w);
        TensorProduct<__nv_bfloat16>(part[half], top[4], bottom[4], top[5], bottom[5], b.x, b.y);
        TensorProduct<__nv_bfloat16>(part[half], top[6], bottom[6], top[7], bottom[7], b.z, b.w);
      }
      load(turn + kCodedWarps, tile);
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        const int group = 2 * t + side;
        const auto values = [&](int which) {
          return CodedValues(coded.low[which][group][tile], coded.high[which][group][tile],
                             factors[warp][which][group][tile], g, threes);
        };
        const float2 scale = values(0);
        totals[tile][0] = fmaf(scale.x, part[side][side], totals[tile][0]);
        totals[tile][1] = fmaf(scale.y, part[side][2 + side], totals[tile][1]);
        if (weight.offsets.low != nullptr) {
          const float2 offset = values(1);
          const float of_x = side == 0 ? sum.x : sum.y;
          totals[tile][0] = fmaf(offset.x, of_x, totals[tile][0]);
          totals[tile][1] = fmaf(offset.y, of_x, totals[tile][1]);
        }
      }
    }
    // The next turn's copies and factors go where these were read.
    __syncwarp();
  }
  if (warp % 2 == 1) add_entries();
  auto* const kept = reinterpret_cast<float*>(factors[warp]);
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float total = totals[tile][r];
      total += __shfl_xor_sync(~0u, total, 1);
      total += __shfl_xor_sync(~0u, total, 2);
      if (t == 0) kept[tile * kTileRows + 8 * r + g] = total;
    }
  }
  __syncthreads();
  if (threadIdx.x >= kRows) return;
  float total = of_entries[threadIdx.x];
#pragma unroll
  for (int i = 0; i < kCodedWarps; ++i) total += reinterpret_cast<const float*>(factors[i])[threadIdx.x];
  y[blockIdx.y * n + first_row + threadIdx.x] = __float2bfloat16(total);
}

}  // namespace any4
