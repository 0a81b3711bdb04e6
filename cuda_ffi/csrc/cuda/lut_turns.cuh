// The product for the weights of most models, at full speed: 4-bit codes, groups of 128 (and of 64 or 32 for one row of
// x), scales and offsets in bfloat16, k a multiple of 256 and n of the block's 16 kTiles rows.
#pragma once

#include "lut_tile.cuh"

namespace any4 {

// The lower or the upper bfloat16 of a word.
__device__ __forceinline__ float HalfOf(uint32_t word, bool high) {
  return __uint_as_float(high ? word & 0xFFFF0000u : word << 16);
}

// What an instance of the kernel is made for.
//
// kCount: rows of x a block takes, 1 or a multiple of 8.
// kTiles: tiles of 16 rows of W a warp decodes; two share the loads and the sums of x.
// kGroups: groups in a tile of 128 inputs; more than one only where kCount is 1. Each group then has a column of its
//   own, and so its own sums, which cost nothing, since the tensor core computes eight columns anyway.
// kOffsets: whether there are any.
template <int kCount_, int kTiles_, int kGroups_, bool kOffsets_>
struct TurnsOf {
  static constexpr int kCount = kCount_, kTiles = kTiles_, kGroups = kGroups_;
  static constexpr bool kOffsets = kOffsets_;
};

// With a single row of x, a table of pairs in shared memory decodes the upper half of a tile's rows and PRMT the lower:
// either pipe alone is slower than memory. With more rows, loading x takes the former's time.
//
// A turn is two tiles: a load of 32 bits brings two groups' scales. The launch bounds leave 128 registers or more, as a
// warp needs them to overlap its steps; more warps of fewer registers were slower.
template <typename T, typename Of>
__global__ void __launch_bounds__(256, Of::kTiles == 1 ? 2 : 1)
    LutTurns(const LutWeight w, const T* x, T* y, const int m) {
  constexpr int kCount = Of::kCount, kTiles = Of::kTiles, kGroups = Of::kGroups;
  constexpr bool kOffsets = Of::kOffsets, kSingle = kCount == 1;
  static_assert(kGroups == 1 || kSingle, "only a single row of x has columns to spare for groups");
  static_assert(!kSingle || kTiles == 1, "the table of pairs is for one tile");
  // Words of two scales a row and turn.
  constexpr int kScales = kGroups == 1 ? 1 : 2;
  constexpr int kBlocks = (kCount + 7) / 8;  // of eight columns
  constexpr int kAhead = kBlocks == 1 ? 4 : 1;
  extern __shared__ __align__(16) unsigned char shared[];
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4, warp = threadIdx.y;
  const int64_t first_row = static_cast<int64_t>(blockIdx.x) * (kTiles * kTileRows);
  const int first_m = blockIdx.y * kCount;
  const int turns = static_cast<int>(w.k / (2 * kTileInputs)), share = (turns + blockDim.y - 1) / blockDim.y;
  const int begin = warp * share;
  int left = 2 * (min(begin + share, turns) - begin);  // tiles

  // Rows are addressed by their distance from the lane's first.
  const uint8_t* codes = w.codes + (first_row + g) * (w.k / 2) + 16 * t + static_cast<int64_t>(begin) * kTileInputs;
  const uint32_t code_stride = static_cast<uint32_t>(4 * w.k), scale_stride = static_cast<uint32_t>(8 * w.groups);
  const int64_t at = (first_row + g) * w.groups + 2 * kGroups * begin;
  const auto* scales = static_cast<const uint16_t*>(w.scales) + at;
  const auto* offsets = static_cast<const uint16_t*>(w.offsets) + at;

  // Of several groups, this lane's columns 2t and 2t + 1 are groups 2t and 2t + 1 where there are such, and its sums of
  // inputs are of group t * kGroups / 4.
  const int scale_pair = kGroups == 4 ? 2 * (t % 2) : 0, offset_pair = kGroups == 4 ? 2 * (t / 2) : 0;
  const bool offset_high = kGroups == 4 ? t % 2 : t / 2;
  uint32_t words[2][2 * kTiles][4], scale[kScales][2 * kTiles], offset[kScales][2 * kTiles];
  const auto load = [&](int tile, int r) {
    if (tile < left) {
      const uint4 v = LoadStreaming(codes + r * code_stride + tile * (kTileInputs / 2));
      uint32_t(&to)[4] = words[tile % 2][r];
      to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
    }
  };
  const auto load_scales = [&](int tile) {
    if (tile < left) {
#pragma unroll
      for (int i = 0; i < kScales; ++i) {
#pragma unroll
        for (int r = 0; r < 2 * kTiles; ++r) {
          const auto two = [&](const uint16_t* stored, int pair) {
            return __ldg(reinterpret_cast<const uint32_t*>(stored + r * scale_stride + (tile + i) * kGroups + pair));
          };
          scale[i][r] = two(scales, scale_pair);
          if constexpr (kOffsets) offset[i][r] = two(offsets, offset_pair);
        }
      }
    }
  };
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
    for (int r = 0; r < 2 * kTiles; ++r) load(tile, r);
  }
  load_scales(0);
  Decoder<T, 4> table[2 * kTiles];
#pragma unroll
  for (int r = kSingle; r < 2 * kTiles; ++r) table[r].Load(w, first_row + g + 8 * r);
  if constexpr (kSingle) {
    FillPairTable<T>(w, first_row, shared);
    __syncthreads();
  }

  const T* inputs = x + 32 * t + static_cast<int64_t>(begin) * (2 * kTileInputs);
  // Columns past the last row of x repeat it and are not stored. A single row is loaded by the lanes of its group's
  // column alone, with zeros in the others, which saves the cache's time.
  const bool seen = !kSingle || g == t * kGroups / 4;
  int64_t from[kBlocks];
#pragma unroll
  for (int c = 0; c < kBlocks; ++c) from[c] = min(first_m + 8 * c + g, m - 1) * w.k;
  uint4 v[kAhead][kBlocks] = {};

  float sums[kTiles][kBlocks][4] = {};
  while (left > 0) {
#pragma unroll
    for (int tile = 0; tile < 2; ++tile) {
      float part[kTiles][kBlocks][4] = {}, sum[kBlocks][4] = {};
#pragma unroll
      for (int eighth = 0; eighth < 4; ++eighth) {
        if (eighth % kAhead == 0) {
#pragma unroll
          for (int e = 0; e < kAhead; ++e) {
#pragma unroll
            for (int c = 0; c < kBlocks; ++c) {
              const auto* address = reinterpret_cast<const uint4*>(inputs + from[c] + tile * kTileInputs) + eighth + e;
              if (seen) v[e][c] = __ldg(address);
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          uint32_t top[4], bottom[4];
          if constexpr (kSingle) {
            DecodePairs(shared, words[tile][0][eighth], top);
          } else {
            table[2 * i].Decode(words[tile][2 * i], eighth, top);
          }
          table[2 * i + 1].Decode(words[tile][2 * i + 1], eighth, bottom);
#pragma unroll
          for (int c = 0; c < kBlocks; ++c) AddProducts<T>(part[i][c], top, bottom, v[eighth % kAhead][c]);
        }
        if constexpr (kOffsets && !kSingle) {
#pragma unroll
          for (int c = 0; c < kBlocks; ++c) {
            AddInputs<T>(sum[c], v[eighth % kAhead][c].x, v[eighth % kAhead][c].y);
            AddInputs<T>(sum[c], v[eighth % kAhead][c].z, v[eighth % kAhead][c].w);
          }
        }
      }
      if constexpr (kOffsets && kSingle) {
        // All eight columns take part, 16 inputs each, so one product is enough; their sums are added up at the end.
        const uint2 four = __ldg(reinterpret_cast<const uint2*>(inputs - 32 * t + tile * kTileInputs) + lane);
        AddInputs<T>(sum[0], four.x, four.y);
      }
#pragma unroll
      for (int r = 0; r < 2 * kTiles; ++r) {
        const uint32_t a = scale[tile % kScales][r], b = kOffsets ? offset[tile % kScales][r] : 0;
        // One group a tile: the word is of two tiles. Else it is of two groups, in two columns.
        const bool b_high = kGroups == 1 ? tile == 1 : offset_high;
#pragma unroll
        for (int side = 0; side < 2; ++side) {
          const bool a_high = kGroups == 1 ? tile == 1 : side == 1;
#pragma unroll
          for (int c = 0; c < kBlocks; ++c) {
            float& total = sums[r / 2][c][2 * (r % 2) + side];
            if (kOffsets) total = fmaf(HalfOf(b, b_high), sum[c][side], total);
            total = fmaf(HalfOf(a, a_high), part[r / 2][c][2 * (r % 2) + side], total);
          }
        }
      }
#pragma unroll
      for (int r = 0; r < 2 * kTiles; ++r) load(tile + 2, r);
    }
    load_scales(2);
    left -= 2, codes += kTileInputs, scales += 2 * kGroups, inputs += 2 * kTileInputs;
    if (kOffsets) offsets += 2 * kGroups;
  }
  // The sums take the place of the table of pairs.
  if (kSingle) __syncthreads();
  auto* partial = reinterpret_cast<float*>(shared);
  constexpr int kKept = 8 * kBlocks;
#pragma unroll
  for (int i = 0; i < kTiles; ++i) KeepSums<kKept>(sums[i], partial + (warp * kTiles + i) * kKept * kTileRows);
  StoreSums(partial, kKept, kTiles, kSingle ? 8 : 1, first_m, m, first_row, w.n, y);
}

}  // namespace any4
