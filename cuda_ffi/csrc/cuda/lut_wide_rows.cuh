// Codes in shared memory to the first operand of wgmma, in registers.
#pragma once

#include "decode.cuh"
#include "lut_stack.cuh"

namespace any4 {

constexpr int kStepInputs = 64;

// Blocks of a product: tiles of columns follow each other, so that codes come from memory once.
struct WideGrid {
  int columns, tiles;  // tiles of columns, and all tiles of a cluster
  int steps;           // of a row
  int group_shift;     // log2 of the inputs of a group, or 30
  int last_group;
};

// A scale or offset twice in a word, as T; conversion apart from the load, which it would wait for.
template <typename T, Type kStored>
__device__ __forceinline__ uint32_t PairOf(uint32_t raw) {
  if constexpr (kStored == Type::kE8m0) raw = raw == 255 ? 0x7FC0u : raw == 0 ? 0x0040u : raw << 7;
  const uint32_t pair = Permute(raw, raw, 0x1010);
  return std::is_same_v<T, __half> && kStored == Type::kBfloat16 ? ToHalves(pair) : pair;
}

// Volatile, since the compiler would put it off to the step that needs it.
template <Type kStored>
__device__ __forceinline__ uint32_t LoadStored(const void* row, int group) {
  uint32_t raw;
  if constexpr (kStored == Type::kE8m0) {
    asm volatile("ld.global.nc.u8 %0, [%1];" : "=r"(raw) : "l"(static_cast<const uint8_t*>(row) + group));
  } else {
    asm volatile("{.reg .u16 half; ld.global.nc.u16 half, [%1]; cvt.u32.u16 %0, half;}"
                 : "=r"(raw)
                 : "l"(static_cast<const uint16_t*>(row) + group));
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

// What a lane decodes: rows g and g + 8 of its warp's 16 rows. kGroups are the groups in a step; or 1 for those of two
// steps or more, and where kPaired is set the steps of an even number and the next are decoded one after the other.
template <typename T, int kGroups, Type kScale, bool kPaired>
struct WideRows {
  static constexpr Type kOffset = kScale == Type::kE8m0 ? Type::kBfloat16 : kScale;

  Decoder<T, 4> table[2];
  const void *scales[2], *offsets[2];
  bool with_offsets;
  // As they are stored, of the step to be decoded next and of the one after it.
  uint32_t raw_scale[2][kGroups][2], raw_offset[2][kGroups][2];
  uint32_t scale[kGroups][2], offset[kGroups][2];  // of the step that is decoded

  __device__ __forceinline__ WideRows(const LutWeight& w, int64_t first_row) : with_offsets(w.offsets != nullptr) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      // Rows past the end repeat the last and are not stored.
      const int64_t row = min(first_row + 8 * r, w.n - 1), at = row * w.groups;
      table[r].Load(w, row);
      scales[r] = static_cast<const uint8_t*>(w.scales) + at * BytesOf(kScale);
      // Where there are none, something else is loaded in their place: a branch would keep instructions apart.
      offsets[r] = with_offsets ? static_cast<const uint8_t*>(w.offsets) + at * BytesOf(kOffset) : w.lut;
    }
  }

  // Loads those of a step to place 0 or 1.
  template <int kPlace>
  __device__ __forceinline__ void Load(const WideGrid& grid, int step) {
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const int group = min((step * kStepInputs + 32 * i) >> grid.group_shift, grid.last_group);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        raw_scale[kPlace][i][r] = LoadStored<kScale>(scales[r], group);
        raw_offset[kPlace][i][r] = LoadStored<kOffset>(offsets[r], with_offsets ? group : 0);
      }
    }
  }

  // The operands of a step's four products, from codes [64, 32 bytes] in shared memory: as they are stored, but for the
  // two 16-byte pieces of rows 4 to 7 of each 8, which are exchanged (swizzle of 32 bytes). wgmma wants of lane 4 g + t
  // the inputs 2t and 2t + 1 of each eight, which are byte t of a word: its four lanes read the same words.
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
    // The second of two steps has the scales of the first.
    if constexpr (!kPaired || kPlace == 0) {
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          scale[i][r] = PairOf<T, kScale>(raw_scale[kPlace][i][r]);
          // -0 changes no product. Chosen here, not where it is loaded, which would wait for the load.
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
