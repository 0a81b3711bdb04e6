// LutTurns: the product for few rows of x, fast for the weights of most models; lut_turns.md has what was measured.
//
// It takes k that is a multiple of 256, n that is a multiple of 32, scales and offsets in bfloat16, and
//   x in bfloat16 with codes of 2, 3, 4 and 8 bits in groups of 128, 256, ... or a row; with 4-bit codes also groups of
//     64 and 32, and in groups of 32 without offsets also e8m0 scales;
//   x in float16 with 4-bit codes in groups of 128.
//
// A block computes 16 kTiles rows of W by kCount rows of x. Its warps split the inputs; here 4 warps split k = 2048:
//
//   inputs   0       256     512     768     1024    1280    1536    1792    2048
//   turns    |   0   |   1   |   2   |   3   |   4   |   5   |   6   |   7   |    of two tiles, 128 inputs each
//   shares   |   0   |   1   |   2   |   3   |   4   |   5   |   6   |   7   |    at most kShares, here of one turn
//   warps    |       0       |       1       |       2       |       3       |
//
// Each warp loads, decodes and multiplies on its own, tile after tile:
//
//   global memory   codes                  x                     scales, offsets
//                     |                    |                       |
//   load              | when the tile two  | when needed           | at the end of the
//                     | before is done     |                       | turn before
//                     v                    v                       v
//   registers       words[2]             v[kAhead]               scale, offset
//                     |                    |                       |
//   decode            | PRMT; rows 0-7 by  |                       |
//                     | the table of pairs |                       |
//                     | where there is one |                       |
//                     v                    |                       |
//                   top, bottom            |                       |
//                     |                    |                       |
//   multiply          +------> mma <-------+                       |
//                               |                                  |
//                             part, sum: of a tile's inputs        |
//                               |        that are in one group     |
//                               |                                  |
//   scale                       +-------------> fma <--------------+
//                                                |
//                                              sums: of a share
//                                                |
//   keep                                         | at the end of each share
//                                                v
//   shared memory   table of pairs             kept [share][tile][column][row]
//                                                |
//   add                                          | all warps, in the order of shares
//                                                v
//   global memory                              y
//
// The warps meet at two __syncthreads(): when the table of pairs is filled, if there is one, and before they add.
#pragma once

#include "lut_stack.cuh"
#include "lut_tile.cuh"

namespace any4 {

// What an instance of the kernel is compiled for.
//
// kBits: bits of a code.
// kCount: rows of x that a block takes, 1 or a multiple of 8.
// kTiles: tiles of 16 rows of W that a warp decodes. Two tiles share the loads and the sums of x.
// kGroups: groups in a tile of 128 inputs; 0 for groups of a tile or more, where each tile loads its own scale. With a
//   single row of x, each group has a column of its own, and so its own sums, at no cost: the tensor core computes
//   eight columns anyway. With more rows, the groups of a tile follow each other: a lane then holds 16 or 8 inputs in a
//   row, not 32.
// kOffsets: whether there are offsets.
// kExponents: whether scales are e8m0, not bfloat16.
template <int kBits_, int kCount_, int kTiles_, int kGroups_, bool kOffsets_, bool kExponents_ = false>
struct TurnsOf {
  static constexpr int kBits = kBits_;
  static constexpr int kCount = kCount_, kTiles = kTiles_, kGroups = kGroups_;
  static constexpr bool kOffsets = kOffsets_, kExponents = kExponents_;
};

// The lower or the upper of the two scales or offsets in a word.
template <bool kExponents>
__device__ __forceinline__ float OneOf(uint32_t two, bool upper) {
  if constexpr (kExponents) {
    const uint32_t e = upper ? two >> 8 : two & 0xFFu;
    return __uint_as_float(e == 255 ? 0x7FC00000u : e == 0 ? 0x00400000u : e << 23);
  }
  return __uint_as_float(upper ? two & 0xFFFF0000u : two << 16);
}

// Loads a lane's codes of a tile: `kParts` pieces, 64 / kParts bytes apart.
template <int kParts>
__device__ __forceinline__ void LoadPieces(const uint8_t* from, uint32_t (&to)[4]) {
  if constexpr (kParts == 1) {
    const uint4 v = LoadStreaming(from);
    to[0] = v.x, to[1] = v.y, to[2] = v.z, to[3] = v.w;
  } else if constexpr (kParts == 2) {
    const uint2 first = LoadStreaming2(from), second = LoadStreaming2(from + 32);
    to[0] = first.x, to[1] = first.y, to[2] = second.x, to[3] = second.y;
  } else {
#pragma unroll
    for (int i = 0; i < 4; ++i) to[i] = LoadStreaming1(from + 16 * i);
  }
}

// With a single row of x and 4-bit codes, a table of pairs in shared memory decodes the upper half of a tile's rows,
// and PRMT the lower half: either pipe alone is slower than memory. With more rows, loading x takes the former's time.
//
// A turn is two tiles, so that one 32-bit load brings the scales of two groups. The launch bounds leave each thread 128
// registers or more, without which a warp can't overlap its steps. Where kGroups is 0, the group of a tile is the
// tile's number >> group_shift.
template <typename T, typename Of>
__global__ void __launch_bounds__(256, Of::kTiles == 1 ? 2 : 1)
    LutTurns(const __grid_constant__ LutBatch batch, const Shares shares, const T* x, const int m,
             const int group_shift) {
  constexpr int kBits = Of::kBits, kCount = Of::kCount, kTiles = Of::kTiles, kGroups = Of::kGroups;
  constexpr bool kOffsets = Of::kOffsets, kSummed = kOffsets || kBits == 8;
  constexpr bool kSingle = kCount == 1, kPairs = kSingle && kBits == 4;
  static_assert(!kSingle || kTiles == 1, "the table of pairs is for one tile");
  static_assert(kBits == 4 || kGroups < 2, "codes of other widths are not loaded in pieces");
  // Pieces of a tile, each with its own scale; and words of a piece, each with eight codes of a lane.
  constexpr bool kLarge = kGroups == 0, kColumns = kSingle && kGroups > 1;
  constexpr int kParts = kSingle || kLarge ? 1 : kGroups, kWords = 4 / kParts;
  // Words of scales per row and turn, of two scales or, where groups are large, of one; and scales from word to word.
  constexpr int kScales = kLarge || kColumns ? 2 : kGroups, kStep = kSingle && kGroups == 4 ? 4 : 2;
  constexpr int kScaleBytes = Of::kExponents ? 1 : 2;
  constexpr int kBlocks = (kCount + 7) / 8;  // of eight columns
  constexpr int kAhead = kBlocks == 1 ? 4 : 1;
  extern __shared__ __align__(16) unsigned char shared[];
  const int lane = threadIdx.x, g = lane / 4, t = lane % 4;
  const Part mine = PartOf<kBits>(batch);
  const LutWeight& w = mine.w;
  // Equal for all weights of the batch: read from the first, whose place is fixed, they take no registers.
  const int64_t k = batch.weights[0].k, groups = batch.weights[0].groups;
  const int64_t first_row = static_cast<int64_t>(mine.block) * (kTiles * kTileRows);
  const int first_m = blockIdx.y * kCount;
  const Turns turns(shares);
  int turn = turns.begin, left = 2 * (turns.end - turns.begin);  // tiles

  // Other rows are addressed by their distance from the lane's first.
  const int64_t first_code = (first_row + g) * (k / 2) + static_cast<int64_t>(turn) * kTileInputs;
  const uint8_t* codes = w.codes + first_code + 16 / kParts * t;
  const uint32_t code_stride = static_cast<uint32_t>(4 * k), scale_stride = static_cast<uint32_t>(8 * groups);
  const int64_t at = (first_row + g) * groups + 2 * kGroups * turn;
  const auto* scales = static_cast<const uint8_t*>(w.scales) + at * kScaleBytes;
  const auto* offsets = static_cast<const uint8_t*>(w.offsets) + at * 2;

  // With a single row and several groups, this lane's columns 2t and 2t + 1 are groups 2t and 2t + 1, where there are
  // that many, and its sums of inputs belong to group t * kGroups / 4.
  const int scale_pair = kStep == 4 ? 2 * (t % 2) : 0, offset_pair = kStep == 4 ? 2 * (t / 2) : 0;
  const bool offset_upper = kGroups == 4 ? t % 2 : t / 2;
  uint32_t words[2][2 * kTiles][kBits], scale[kScales][2 * kTiles], offset[kScales][2 * kTiles];
  const auto load = [&](int tile, int r) {
    if (tile >= left) return;
    if constexpr (kBits == 4) {
      LoadPieces<kParts>(codes + r * code_stride + tile * (kTileInputs / 2), words[tile % 2][r]);
    } else {
      const int64_t input = static_cast<int64_t>(2 * turn + tile) * kTileInputs + 32 * t;
      LoadCodes<kBits>(w, first_row + g + 8 * r, input, words[tile % 2][r]);
    }
  };
  // Word i of a turn's scales or offsets, as they are stored; `next` is 1 for the next turn's.
  const auto load_word = [&](const uint8_t* stored, int bytes, int r, int i, int pair, int next) -> uint32_t {
    if constexpr (kLarge) {
      const int group = (2 * (turn + next) + i) >> group_shift;
      return __ldg(reinterpret_cast<const uint16_t*>(stored) + r * scale_stride + group);
    }
    stored += (r * scale_stride + 2 * kGroups * next + i * kStep + pair) * bytes;
    if (bytes == 1) return __ldg(reinterpret_cast<const uint16_t*>(stored));
    return __ldg(reinterpret_cast<const uint32_t*>(stored));
  };
  const auto load_scales = [&](int next) {
    if (2 * next < left) {
#pragma unroll
      for (int i = 0; i < kScales; ++i) {
#pragma unroll
        for (int r = 0; r < 2 * kTiles; ++r) {
          scale[i][r] = load_word(scales, kScaleBytes, r, i, scale_pair, next);
          if constexpr (kOffsets) offset[i][r] = load_word(offsets, 2, r, i, offset_pair, next);
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
  Decoder<T, kBits> table[2 * kTiles];
#pragma unroll
  for (int r = kPairs; r < 2 * kTiles; ++r) table[r].Load(w, first_row + g + 8 * r);
  if constexpr (kPairs) {
    FillPairTable<T>(w, first_row, shared);
    __syncthreads();
  }

  const T* inputs = x + 32 / kParts * t + static_cast<int64_t>(turn) * (2 * kTileInputs);
  // Columns past the last row of x repeat that row and are not stored. A single row is loaded only by the lanes of its
  // group's column; the others hold zeros, which saves the cache's time.
  const bool seen = !kSingle || g == t * kGroups / 4;
  int64_t from[kBlocks];
#pragma unroll
  for (int c = 0; c < kBlocks; ++c) from[c] = min(first_m + 8 * c + g, m - 1) * k;
  uint4 v[kAhead][kBlocks] = {};

  constexpr int kKept = kSingle ? 1 : 8 * kBlocks;
  auto* const kept = reinterpret_cast<float*>(shared + (kPairs ? kPairTableBytes : 0));
  float* partial = kept + turns.share * (kTiles * kKept * kColumn);
  while (left > 0) {
    float sums[kTiles][kBlocks][4] = {};
    for (const int end = min(turn + shares.turns, turns.end); turn < end; ++turn) {
#pragma unroll
      for (int tile = 0; tile < 2; ++tile) {
        float part[kTiles][kBlocks][4], sum[kBlocks][4];
#pragma unroll
        for (int word = 0; word < 4; ++word) {
          if (word % kWords == 0) {
#pragma unroll
            for (int c = 0; c < kBlocks; ++c) {
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                sum[c][j] = 0;
#pragma unroll
                for (int i = 0; i < kTiles; ++i) part[i][c][j] = 0;
              }
            }
          }
          if (word % kAhead == 0) {
#pragma unroll
            for (int e = word; e < word + kAhead; ++e) {
#pragma unroll
              for (int c = 0; c < kBlocks; ++c) {
                const auto* address = reinterpret_cast<const uint4*>(inputs + from[c] + tile * kTileInputs) +
                                      e / kWords * (16 / kParts) + e % kWords;
                if (seen) v[e - word][c] = __ldg(address);
              }
            }
          }
#pragma unroll
          for (int i = 0; i < kTiles; ++i) {
            uint32_t top[4], bottom[4];
            if constexpr (kPairs) {
              DecodePairs(shared, words[tile][0][word], top);
            } else {
              table[2 * i].Decode(words[tile][2 * i], word, top);
            }
            table[2 * i + 1].Decode(words[tile][2 * i + 1], word, bottom);
#pragma unroll
            for (int c = 0; c < kBlocks; ++c) AddProducts<T>(part[i][c], top, bottom, v[word % kAhead][c]);
          }
          if constexpr (kSummed && !kSingle) {
#pragma unroll
            for (int c = 0; c < kBlocks; ++c) {
              AddInputs<T>(sum[c], v[word % kAhead][c].x, v[word % kAhead][c].y);
              AddInputs<T>(sum[c], v[word % kAhead][c].z, v[word % kAhead][c].w);
            }
          }
          if (word % kWords < kWords - 1) continue;
          if constexpr (kSummed && kSingle) {
            // One product is enough for a tile: each of the eight columns sums 16 inputs. They are added at the end.
            const uint2 four = __ldg(reinterpret_cast<const uint2*>(inputs - 32 * t + tile * kTileInputs) + lane);
            AddInputs<T>(sum[0], four.x, four.y);
          }
          // A word serves one tile where groups are large, two columns where groups have their own, else two pieces.
          const int number = tile * kParts + word / kWords, in = kLarge || kColumns ? tile : number / 2;
#pragma unroll
          for (int r = 0; r < 2 * kTiles; ++r) {
#pragma unroll
            for (int side = 0; side < 2; ++side) {
              const bool upper = !kLarge && (kColumns ? side : number % 2);
              float a = OneOf<Of::kExponents>(scale[in][r], upper);
              float b = kOffsets ? OneOf<false>(offset[in][r], kColumns ? offset_upper : upper) : 0.0f;
              table[r].Affine(a, b);
#pragma unroll
              for (int c = 0; c < kBlocks; ++c) {
                float& total = sums[r / 2][c][2 * (r % 2) + side];
                if (kSummed) total = fmaf(b, sum[c][side], total);
                total = fmaf(a, part[r / 2][c][2 * (r % 2) + side], total);
              }
            }
          }
        }
#pragma unroll
        for (int r = 0; r < 2 * kTiles; ++r) load(tile + 2, r);
      }
      load_scales(1);
      left -= 2, codes += kTileInputs, inputs += 2 * kTileInputs;
      scales += 2 * kGroups * kScaleBytes, offsets += 2 * kGroups * 2;
    }
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      if constexpr (kSingle) {
        KeepSum(sums[i][0], partial);
      } else {
        KeepSums<kKept>(sums[i], partial + i * (kKept * kColumn));
      }
    }
    partial += kTiles * kKept * kColumn;
  }
  StoreSums(kept, shares.count, kKept, kTiles, 1, first_m, m, first_row, w.n, static_cast<T*>(mine.y));
}

}  // namespace any4
