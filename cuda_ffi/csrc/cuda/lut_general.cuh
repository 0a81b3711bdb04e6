// LutGeneral: the product for any weight: codes of 2, 3, 4 and 8 bits, groups of 16, 32, 64, 128, ... inputs, scales of
// every stored type, any n; k % 32 == 0.
#pragma once

#include "lut_stack.cuh"
#include "lut_tile.cuh"

namespace any4 {

// Element `at` of an array of scales or offsets, as it is stored. Loading is separate from converting, which would wait
// for the load.
__device__ __forceinline__ uint32_t LoadRaw(const void* stored, Type type, int64_t at) {
  switch (type) {
    case Type::kFloat32: return __ldg(static_cast<const uint32_t*>(stored) + at);
    case Type::kE8m0: return __ldg(static_cast<const uint8_t*>(stored) + at);
    default: return __ldg(static_cast<const uint16_t*>(stored) + at);
  }
}

__device__ __forceinline__ float FromRaw(uint32_t raw, Type type) {
  switch (type) {
    case Type::kBfloat16: return __uint_as_float(raw << 16);
    case Type::kFloat16: return __half2float(__ushort_as_half(static_cast<uint16_t>(raw)));
    case Type::kFloat32: return __uint_as_float(raw);
    default: return __uint_as_float(raw == 255 ? 0x7FC00000u : raw == 0 ? 0x00400000u : raw << 23);
  }
}

constexpr int kGeneralColumns = 8;

// A block takes 16 rows of W and eight columns of work; a warp's turn is one tile.
template <typename T, int kBits>
__global__ void __launch_bounds__(256, 2)
    LutGeneral(const __grid_constant__ LutBatch batch, const Shares shares, const T* x, const Columns columns) {
  extern __shared__ __align__(16) unsigned char shared[];
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  const Part mine = PartOf<kBits>(batch);
  const LutWeight& w = mine.w;
  const int64_t first_row = static_cast<int64_t>(mine.block) * kTileRows;
  const int split = columns.split, last_group = (1 << split) - 1;
  const int first_m = (blockIdx.y * kGeneralColumns) >> split;
  // Rows past the end repeat the last row and are not stored.
  const int64_t rows[2] = {min(first_row + g, w.n - 1), min(first_row + g + 8, w.n - 1)};
  const Turns turns(shares);
  const bool with_offsets = w.offsets != nullptr, summed = with_offsets || kBits == 8;

  uint32_t words[2][2][kBits] = {};  // codes of this turn and of the next
  const auto load = [&](int tile, uint32_t(&codes)[2][kBits]) {
    const int64_t input = static_cast<int64_t>(tile) * kTileInputs + 32 * t;
    if (tile < turns.end && input < w.k) {
#pragma unroll
      for (int r = 0; r < 2; ++r) LoadCodes<kBits>(w, rows[r], input, codes[r]);
    }
  };
  load(turns.begin, words[0]);
  Decoder<T, kBits> table[2];
  table[0].Load(w, rows[0]);
  table[1].Load(w, rows[1]);

  // Whether the group of column g holds the first 16, and the last 16, of this lane's inputs.
  const int of_x = first_m + (g >> split);
  const bool seen[2] = {of_x < columns.m && (32 * t) >> (7 - split) == (g & last_group),
                        of_x < columns.m && (32 * t + 16) >> (7 - split) == (g & last_group)};

  float sums[1][4] = {};
  const auto add = [&](int tile, const uint32_t(&codes)[2][kBits]) {
    const int64_t input = static_cast<int64_t>(tile) * kTileInputs + 32 * t;
    uint32_t raw[2][2], raw_offset[2][2] = {};  // of rows g and g + 8, columns 2t and 2t + 1
#pragma unroll
    for (int side = 0; side < 2; ++side) {
      const int64_t group = split == 0 ? tile >> columns.group_shift
                                       : (static_cast<int64_t>(tile) << split) + ((2 * t + side) & last_group);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int64_t at = rows[r] * w.groups + min(group, w.groups - 1);
        raw[r][side] = LoadRaw(w.scales, w.scale_type, at);
        if (with_offsets) raw_offset[r][side] = LoadRaw(w.offsets, w.offset_type, at);
      }
    }
    float part[4] = {}, sum[4] = {};
#pragma unroll
    for (int eighth = 0; eighth < 4; ++eighth) {
      uint32_t top[4], bottom[4];
      table[0].Decode(codes[0], eighth, top);
      table[1].Decode(codes[1], eighth, bottom);
      uint4 v = make_uint4(0, 0, 0, 0);
      if (seen[eighth / 2] && input < w.k) v = __ldg(reinterpret_cast<const uint4*>(x + of_x * w.k + input) + eighth);
      AddProducts<T>(part, top, bottom, v);
      if (summed) {
        AddInputs<T>(sum, v.x, v.y);
        AddInputs<T>(sum, v.z, v.w);
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int side = 0; side < 2; ++side) {
        float scale = FromRaw(raw[r][side], w.scale_type);
        float offset = with_offsets ? FromRaw(raw_offset[r][side], w.offset_type) : 0.0f;
        table[r].Affine(scale, offset);
        float& total = sums[0][2 * r + side];
        if (summed) total = fmaf(offset, sum[side], total);
        total = fmaf(scale, part[2 * r + side], total);
      }
    }
  };
  auto* const kept = reinterpret_cast<float*>(shared);
  float* partial = kept + turns.share * (kGeneralColumns * kColumn);
  int share_end = min(turns.begin + shares.turns, turns.end);
  const auto keep = [&](int tile) {
    if (tile != share_end) return;
    KeepSums<kGeneralColumns>(sums, partial);
    partial += kGeneralColumns * kColumn, share_end = min(share_end + shares.turns, turns.end);
#pragma unroll
    for (float& total : sums[0]) total = 0;
  };
  for (int tile = turns.begin; tile < turns.end; tile += 2) {
    load(tile + 1, words[1]);
    add(tile, words[0]);
    keep(tile + 1);
    load(tile + 2, words[0]);
    if (tile + 1 >= turns.end) break;
    add(tile + 1, words[1]);
    keep(tile + 2);
  }
  StoreSums(kept, shares.count, kGeneralColumns, 1, 1 << split, first_m, columns.m, first_row, w.n,
            static_cast<T*>(mine.y));
}

}  // namespace any4
