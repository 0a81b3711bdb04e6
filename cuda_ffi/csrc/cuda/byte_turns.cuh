// ByteTurns: the product for few rows of x, with tables of int8 and x rounded to integers; byte_turns.md has how it
// looks entries up, what x is rounded to, and what was measured.
//
// It takes 4-bit codes, k that is a multiple of 256, n that is a multiple of 32, x, scales and offsets in bfloat16, and
// groups of 64, 128, ... or a row. Blocks, warps, turns and shares are those of lut_turns.cuh: lane 4 g + t decodes
// inputs 32 t to 32 t + 31 of rows g and g + 8 of a tile. Each warp works on its own, turn after turn:
//
//   global memory   x of a turn            codes                 scales, offsets
//                     |                      |                      |
//   round             | Quantize             | when the tile two    | at the end of the
//                     v                      | before is done       | turn before
//   shared memory   bytes [row of x][limb]   |                      |
//                     |                      v                      |
//   registers       four                   words[2]               scale, offset
//                     |                      |                      |
//   look up           |                      | PRMT: low, high      |
//                     |                      v                      |
//   multiply          +-------> mma <--------+                      |
//                                |                                  |
//                              low, high, ones: int32, of a turn    |
//                                |                                  |
//   scale                        +------------> fma <---------------+
//                                                |
//                                              sums: of a share
//
// The eight columns of a tensor core's product are the parts of a turn's 256 inputs that have their own factor: eight
// blocks of 32 inputs, or four of 64 in two limbs. Each lane holds the bytes of its column's part, and zeros for the
// rest, so that one row of x fills the tensor core.
#pragma once

#include "lut_stack.cuh"
#include "lut_tile.cuh"

namespace any4 {

// The bytes of eight codes in a half of a table, as PRMT takes them from two words.
__device__ __forceinline__ uint2 LookUp(const uint32_t* half, uint32_t codes) {
  return make_uint2(Permute(half[0], half[1], codes), Permute(half[0], half[1], codes >> 16));
}

// c += a b in int8 for eight inputs a lane: `top` and `bottom` of rows g and g + 8, and word `word` % 2 of x's two.
__device__ __forceinline__ void AddBytes(int (&c)[4], const uint2& top, const uint2& bottom, int word, const uint4& x) {
  ByteProduct(c, top.x, bottom.x, top.y, bottom.y, word % 2 ? x.z : x.x, word % 2 ? x.w : x.y);
}

// What an instance of the kernel is compiled for.
//
// kLimbs: bytes of an input: 1 with a factor for 32 inputs, 2 with one for 64.
// kTiles: tiles of 16 rows of W that a warp takes; they share the rounded x.
// kRows: rows of x that a block takes.
// kOffsets: whether there are offsets.
template <int kLimbs_, int kTiles_, int kRows_, bool kOffsets_>
struct RoundedOf {
  static constexpr int kLimbs = kLimbs_, kTiles = kTiles_, kRows = kRows_;
  static constexpr bool kOffsets = kOffsets_;
};

constexpr int kTurnInputs = 2 * kTileInputs;

// A float of this size holds an integer of up to 22 bits in its low bits, as a difference to those of kMagic.
constexpr float kMagic = 12582912.0f;
constexpr int kMagicBits = 0x4B400000;
__device__ __forceinline__ float FromMagic(int bits) { return __int_as_float(bits) - kMagic; }

// Rounds a turn's 256 inputs of a row, eight a lane, to integers of the largest magnitude among 32 or 64, and stores
// their bytes: [limb][256], the high limb first. Returns the factor of the lane's inputs, NaN where one isn't finite.
template <int kLimbs>
__device__ __forceinline__ float Quantize(const uint4& x, unsigned char* bytes) {
  const uint32_t words[4] = {x.x, x.y, x.z, x.w};
  uint32_t top = 0;  // magnitudes are ordered as their bits are, and NaN is the largest
#pragma unroll
  for (uint32_t word : words) top = __vmaxu2(top, word & 0x7FFF7FFFu);
  constexpr uint32_t kSmallest = 0x0D80;  // 2^-100: the inverse of anything smaller could overflow
  top = max(max(top >> 16, top & 0xFFFFu), kSmallest);
#pragma unroll
  for (int lanes = 1; lanes < 4 * kLimbs; lanes *= 2) top = max(top, __shfl_xor_sync(~0u, top, lanes));
  constexpr float kMost = kLimbs == 2 ? 32639.0f : 127.0f;  // 127 * 256 + 127
  const float largest = __uint_as_float(top << 16);
  // Of two limbs the last bit doesn't matter; of one it is as the reference has it.
  const float inverse = kLimbs == 2 ? __fdividef(kMost, largest) : __fdiv_rn(kMost, largest);
  uint32_t q[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float value = __uint_as_float(i % 2 ? words[i / 2] & 0xFFFF0000u : words[i / 2] << 16);
    // The low limb is from -128 to 127: with 128 more, the second byte is the high limb.
    const float rounded = kLimbs == 2 ? fmaf(value, inverse, kMagic + 128)
                                      : __fadd_rn(__fmul_rn(value, inverse), kMagic);
    q[i] = __float_as_uint(rounded);
  }
  uint2 high, low;
  const auto limbs = [](const uint32_t* four, uint32_t& first, uint32_t& second) {
    const uint32_t a = Permute(four[0], four[1], 0x5140), b = Permute(four[2], four[3], 0x5140);
    first = Permute(a, b, 0x5410);
    second = Permute(a, b, 0x7632);
  };
  limbs(q, low.x, high.x);
  limbs(q + 4, low.y, high.y);
  auto* const to = reinterpret_cast<uint2*>(bytes) + threadIdx.x;
  if constexpr (kLimbs == 2) {
    to[0] = high;
    to[32] = make_uint2(low.x ^ 0x80808080u, low.y ^ 0x80808080u);
  } else {
    to[0] = low;
  }
  constexpr uint32_t kInfinity = 0x7F80;
  return top < kInfinity ? largest * (1.0f / kMost) : __uint_as_float(0x7FC00000u);
}

// Four entries of each half of a table, prepared for PRMT with whole codes as selectors: where a code's highest bit is
// not the half's, PRMT gives the sign of the entry it would have taken, 0 or -1, and the other half makes up for it.
// All entries become one smaller, so that there is room for that; -128 counts as -127.
__device__ __forceinline__ void PrepareHalves(uint32_t& lower, uint32_t& upper) {
  constexpr uint32_t kOnes = 0x01010101u;
  lower = __vsub4(__vmaxs4(lower, 0x81818181u), kOnes);
  upper = __vsub4(__vmaxs4(upper, 0x81818181u), kOnes);
  // -1 becomes 0 if the other is negative too, else it stays negative, as all below do.
  const uint32_t to_zero = __vcmpeq4(lower, ~0u) & (upper >> 7);
  upper = __vadd4(upper, (lower >> 7) & ~to_zero & kOnes);
  lower = __vadd4(lower, (upper >> 7) & kOnes);
}

template <typename Of>
struct ByteMemory {  // of a warp
  unsigned char bytes[Of::kRows][Of::kLimbs * kTurnInputs];
  uint32_t tables[Of::kTiles][kTileRows][4];
  uint32_t zeros[8];  // what lanes read for inputs outside their column's part
};

// The groups of a row are those of its 64 inputs >> group_shift. The launch bounds leave a thread 128 registers.
template <typename Of>
__global__ void __launch_bounds__(256, 2)
    ByteTurns(const __grid_constant__ LutBatch batch, const Shares shares, const __nv_bfloat16* x, const int m,
              const int group_shift) {
  constexpr int kLimbs = Of::kLimbs, kTiles = Of::kTiles, kRows = Of::kRows;
  __shared__ __align__(16) ByteMemory<Of> memory[8];
  __shared__ float kept[kShares * kTiles * kRows * kColumn];
  auto& own = memory[threadIdx.y];
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  const Part mine = PartOf<4>(batch);
  const LutWeight& w = mine.w;
  // Equal for all weights of the batch: read from the first, whose place is fixed, they take no registers.
  const int k = static_cast<int>(batch.weights[0].k), groups = static_cast<int>(batch.weights[0].groups);
  const int64_t first_row = static_cast<int64_t>(mine.block) * (kTiles * kTileRows);
  const int first_m = blockIdx.y * kRows;
  const Turns turns(shares);
  int turn = turns.begin, left = 2 * (turns.end - turns.begin);  // tiles

  const uint8_t* codes = w.codes + (first_row + g) * (k / 2) + static_cast<int64_t>(turn) * kTileInputs + 16 * t;
  const uint32_t code_stride = static_cast<uint32_t>(4 * k), scale_stride = static_cast<uint32_t>(8 * groups);
  const auto* scales = static_cast<const uint16_t*>(w.scales) + (first_row + g) * groups;
  const auto* offsets = static_cast<const uint16_t*>(w.offsets) + (first_row + g) * groups;
  uint32_t words[2][2 * kTiles][4], scale[2 * kTiles], offset[2 * kTiles];
  const auto load = [&](int tile, int r) {
    if (tile >= left) return;
    const uint4 v = LoadStreaming(codes + r * code_stride + tile * (kTileInputs / 2));
    auto& to = words[tile % 2][r];
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  };
  // A lane's columns 2t and 2t + 1 are of the turn's t-th 64 inputs, which lie in one group.
  const auto load_scales = [&](int of) {
    const uint32_t group = (4 * of + t) >> group_shift;
#pragma unroll
    for (int r = 0; r < 2 * kTiles; ++r) {
      scale[r] = __ldg(scales + r * scale_stride + group);
      if constexpr (Of::kOffsets) offset[r] = __ldg(offsets + r * scale_stride + group);
    }
  };
  // Rows past the last of x repeat it and are not stored.
  const auto* inputs = reinterpret_cast<const uint4*>(x) + 32 * turn + lane;
  uint4 next[kRows] = {};
  const auto load_inputs = [&] {
#pragma unroll
    for (int c = 0; c < kRows; ++c) {
      next[c] = __ldg(inputs + static_cast<int64_t>(min(first_m + c, m - 1)) * (k / 8));
    }
  };
  if (left > 0) load_inputs();
#pragma unroll
  for (int tile = 0; tile < 2; ++tile) {
#pragma unroll
    for (int r = 0; r < 2 * kTiles; ++r) load(tile, r);
  }
  if (left > 0) load_scales(turn);

  // Each lane prepares half of a row's table.
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    const int row = lane / 2, half = lane % 2;
    const auto* from = static_cast<const uint32_t*>(w.lut) + (first_row + i * kTileRows + row) * (w.lut_stride / 4);
    uint32_t lower = __ldg(from + half), upper = __ldg(from + half + 2);
    PrepareHalves(lower, upper);
    own.tables[i][row][half] = lower;
    own.tables[i][row][half + 2] = upper;
  }
  if (lane < 8) own.zeros[lane] = 0;
  __syncwarp();
  uint32_t table[2 * kTiles][4];
#pragma unroll
  for (int r = 0; r < 2 * kTiles; ++r) {
    const uint4 v = *reinterpret_cast<const uint4*>(own.tables[r / 2][g + 8 * (r % 2)]);
    table[r][0] = v.x, table[r][1] = v.y, table[r][2] = v.z, table[r][3] = v.w;
  }

  // Column g is of tile g / 4 of a turn: its block g % 4 of 32 inputs, or limb g % 2 of its half g / 2 % 2.
  const bool seen = kLimbs == 2 ? g / 2 % 2 == t / 2 : g % 4 == t;
  const int at = (kLimbs == 2 ? kTurnInputs * (g % 2) : 0) + 32 * t;
  const uint2 all_ones = make_uint2(0x01010101u, 0x01010101u);
  int share = turns.share;
  while (left > 0) {
    float sums[kRows][2 * kTiles] = {};
    for (const int end = min(turn + shares.turns, turns.end); turn < end; ++turn) {
      float factor[kRows][2];
#pragma unroll
      for (int c = 0; c < kRows; ++c) {
        const float of_lane = Quantize<kLimbs>(next[c], own.bytes[c]);
        factor[c][0] = factor[c][1] = __shfl_sync(~0u, of_lane, 8 * t);
        if constexpr (kLimbs == 2) factor[c][0] *= 256;
        if constexpr (kLimbs == 1) factor[c][1] = __shfl_sync(~0u, of_lane, 8 * t + 4);
      }
      __syncwarp();
      inputs += kTurnInputs / 8;
      if (left > 2) load_inputs();
      int low[kTiles][kRows][4] = {}, high[kTiles][kRows][4] = {}, ones[kRows][4];
#pragma unroll
      for (int c = 0; c < kRows; ++c) ones[c][0] = ones[c][1] = ones[c][2] = ones[c][3] = kMagicBits;
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        const bool own_part = seen && g / 4 == tile;
        uint4 four[kRows];
#pragma unroll
        for (int word = 0; word < 4; ++word) {
          if (word % 2 == 0) {
#pragma unroll
            for (int c = 0; c < kRows; ++c) {
              const unsigned char* from = own_part ? own.bytes[c] + at + kTileInputs * tile
                                                   : reinterpret_cast<const unsigned char*>(own.zeros);
              four[c] = reinterpret_cast<const uint4*>(from)[word / 2];
            }
          }
#pragma unroll
          for (int c = 0; c < kRows; ++c) AddBytes(ones[c], all_ones, all_ones, word, four[c]);
#pragma unroll
          for (int i = 0; i < kTiles; ++i) {
            const uint2 lower[2] = {LookUp(table[2 * i], words[tile][2 * i][word]),
                                    LookUp(table[2 * i + 1], words[tile][2 * i + 1][word])};
            const uint2 upper[2] = {LookUp(table[2 * i] + 2, words[tile][2 * i][word] ^ 0x88888888u),
                                    LookUp(table[2 * i + 1] + 2, words[tile][2 * i + 1][word] ^ 0x88888888u)};
#pragma unroll
            for (int c = 0; c < kRows; ++c) {
              AddBytes(low[i][c], lower[0], lower[1], word, four[c]);
              AddBytes(high[i][c], upper[0], upper[1], word, four[c]);
            }
          }
        }
#pragma unroll
        for (int r = 0; r < 2 * kTiles; ++r) load(tile + 2, r);
      }
#pragma unroll
      for (int c = 0; c < kRows; ++c) {
        const float x_sum = fmaf(factor[c][0], FromMagic(ones[c][0]), factor[c][1] * FromMagic(ones[c][1]));
#pragma unroll
        for (int r = 0; r < 2 * kTiles; ++r) {
          const int(&l)[4] = low[r / 2][c], (&h)[4] = high[r / 2][c];
          const int j = 2 * (r % 2);
          // The prepared entries are one too small.
          const float first = FromMagic(l[j] + h[j] + ones[c][0]), second = FromMagic(l[j + 1] + h[j + 1] + ones[c][1]);
          const float part = fmaf(factor[c][0], first, factor[c][1] * second);
          sums[c][r] = fmaf(__uint_as_float(scale[r] << 16), part, sums[c][r]);
          if constexpr (Of::kOffsets) sums[c][r] = fmaf(__uint_as_float(offset[r] << 16), x_sum, sums[c][r]);
        }
      }
      __syncwarp();
      left -= 2, codes += kTileInputs;
      if (left > 0) load_scales(turn + 1);
    }
    float* partial = kept + share * (kTiles * kRows * kColumn);
#pragma unroll
    for (int c = 0; c < kRows; ++c) {
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        KeepSum({sums[c][2 * i], 0, sums[c][2 * i + 1], 0}, partial + (i * kRows + c) * kColumn);
      }
    }
    ++share;
  }
  StoreSums(kept, shares.count, kRows, kTiles, 1, first_m, m, first_row, w.n, static_cast<__nv_bfloat16*>(mine.y));
}

}  // namespace any4
