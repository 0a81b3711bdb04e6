// Decodes codes in shared memory to the first operand of wgmma, in registers.
#pragma once

#include "decode.cuh"
#include "lut_stack.cuh"

namespace any4 {

constexpr int kStepInputs = 64;

// The tiles of y. Those with the same rows of W follow each other, so that codes come from memory once.
struct WideGrid {
  int columns, tiles;  // tiles with the same rows of W, and all tiles; a tile is what a cluster computes at a time
  int steps, part_steps;  // of a row, and of each part of it but the last, which may have fewer
  int group_shift;     // log2 of the inputs of a group, at most 30
  int last_group;
};

// A scale or offset as T, twice in a word. Converting is separate from loading, for which it would wait.
template <typename T, Type kStored>
__device__ __forceinline__ uint32_t PairOf(uint32_t raw) {
  if constexpr (kStored == Type::kE8m0) raw = raw == 255 ? 0x7FC0u : raw == 0 ? 0x0040u : raw << 7;
  const uint32_t pair = Permute(raw, raw, 0x1010);
  return std::is_same_v<T, __half> && kStored == Type::kBfloat16 ? ToHalves(pair) : pair;
}

// Loads a scale or offset as it is stored. Volatile, since the compiler would move the load to the step that needs it.
template <Type kStored>
__device__ __forceinline__ uint32_t LoadStored(const void* array, uint32_t at) {
  uint32_t raw;
  if constexpr (kStored == Type::kE8m0) {
    asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(raw) : "l"(static_cast<const uint8_t*>(array) + at));
  } else {
    asm volatile("{.reg .u16 half; ld.global.nc.u16 half, [%1]; cvt.u32.u16 %0, half;}"
                 : "=r"(raw)
                 : "l"(static_cast<const uint16_t*>(array) + at));
  }
  return raw;
}

template <typename T>
__device__ __forceinline__ uint32_t Affine(uint32_t values, uint32_t scale, uint32_t offset) {
  uint32_t out;
  if constexpr (std::is_same_v<T, __half>) {
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(values), "r"(scale), "r"(offset));
  } else {
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(out) : "r"(values), "r"(scale), "r"(offset));
  }
  return out;
}

// What a lane decodes: rows g and g + 8 of its warp's 16 rows. kGroups is the number of groups in a step; or 1 for
// groups of two steps or more: then a step of an even number and the next, which are decoded one after the other, share
// their scales.
template <typename T, int kGroups, Type kScale>
struct WideRows {
  static constexpr Type kOffset = kScale == Type::kE8m0 ? Type::kBfloat16 : kScale;

  Decoder<T, 4> table[2];
  const void *scales, *offsets;
  uint32_t first[2];  // of a row's scales and offsets in their arrays
  bool with_offsets;
  // As they are stored, for the step to be decoded next and the one after it.
  uint32_t raw_scale[2][kGroups][2], raw_offset[2][kGroups][2];
  uint32_t scale[kGroups][2], offset[kGroups][2];  // for the step that is being decoded

  // Where there are no offsets, scales are loaded in their place: a branch would keep instructions apart.
  __device__ __forceinline__ WideRows(const LutWeight& w, int64_t first_row)
      : scales(w.scales), offsets(w.offsets != nullptr ? w.offsets : w.scales), with_offsets(w.offsets != nullptr) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // Rows past the end repeat the last row and are not stored.
      const int64_t row = min(first_row + 8 * r, w.n - 1);
      table[r].Load(w, row);
      first[r] = static_cast<uint32_t>(row * w.groups);
    }
  }

  // Loads the scales and offsets of a step to place 0 or 1.
  template <int kPlace>
  __device__ __forceinline__ void Load(const WideGrid& grid, int step) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int group = min((step * kStepInputs + 32 * i) >> grid.group_shift, grid.last_group);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        raw_scale[kPlace][i][r] = LoadStored<kScale>(scales, first[r] + group);
        // Scales of one byte are fewer bytes than offsets would be.
        const bool any = kScale != Type::kE8m0 || with_offsets;
        raw_offset[kPlace][i][r] = LoadStored<kOffset>(offsets, any ? first[r] + group : 0);
      }
    }
  }

  // Decodes the operands of a step's four products from codes [64, 32 bytes] in shared memory. The codes are as stored,
  // except that the two 16-byte pieces of rows 4 to 7 of each 8 are exchanged (the swizzle of 32 bytes). From lane 4 g
  // + t, wgmma takes inputs 2t and 2t + 1 of each eight, which are byte t of a word: the four lanes of a row read the
  // same words.
  template <int kPlace>
  __device__ __forceinline__ void Decode(const unsigned char* codes, const WideGrid& grid, int later_step,
                                         uint32_t (&a)[4][4]) {
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, warp = threadIdx.x / 32 % 4;
    const uint32_t byte_of_two = 0x40 + 0x11 * t;
    const unsigned char* row = codes + (16 * warp + g) * 32;
    uint32_t words[2][4] = {};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint4 v = *reinterpret_cast<const uint4*>(row + 256 * r + (half ^ g / 4) * 16);
        words[r][half] = Permute(Permute(v.x, v.y, byte_of_two), Permute(v.z, v.w, byte_of_two), 0x5410);
      }
    }
    if constexpr (kGroups > 1 || kPlace == 0) {
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          scale[i][r] = PairOf<T, kScale>(raw_scale[kPlace][i][r]);
          // Adding -0 changes no product. It is chosen here, since choosing at the load would wait for the load.
          offset[i][r] = with_offsets ? PairOf<T, kOffset>(raw_offset[kPlace][i][r]) : 0x80008000u;
        }
      }
      Load<kPlace>(grid, later_step);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int group = kGroups == 2 ? half : 0;
        uint32_t values[4];
        table[r].Decode(words[r], half, values);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          a[2 * half + i / 2][2 * (i % 2) + r] = Affine<T>(values[i], scale[group][r], offset[group][r]);
        }
      }
    }
  }
};

}  // namespace any4
