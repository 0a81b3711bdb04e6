// LutWide: the product for many rows of x with 4-bit codes, on Hopper; lut_wide.md has what was measured.
//
// A block stays on its multiprocessor and computes one tile of y after another: kRows rows of W by kColumns rows of x.
// Its last warpgroup copies; the others decode and multiply. Here kTiles = 2, kSplit = 1 and kCluster = 1:
//
//                     warpgroup 2, one thread          warpgroups 0 and 1, for 64 rows of W each
//
//   global memory   x              codes             tables, scales,          y
//                     |              |               offsets                  ^
//   copy              | TMA          | TMA             | loads, of scales     | TMA, by one thread
//                     v              v                 | two steps ahead      | of each warpgroup
//   shared memory   x[s]           codes[s]            |                    results
//                     |              |                 |                      ^
//   decode            |              +---> PRMT, FMA <-+                      | rounding, stmatrix
//                     |                     |                                 |
//                     |                     v                                 |
//   registers         |                    a[2]                             sums
//                     |                     |                                 ^
//   multiply          +------> wgmma <------+                                 |
//                                |                                            |
//                                +--------------------------------------------+
//
// Stage s of kStages holds a step, 64 inputs: x[s] [kColumns, 128 bytes] and codes[s] [kRows, 32 bytes]. A step is four
// wgmma of 16 inputs. Of a warpgroup, a[2] are the weights of two steps, sums [64, kColumns], results [kColumns, 64].
// Each stage has two barriers in shared memory:
//
//   arrived[s]   completes when its copies have brought all their bytes: the stage may be read
//   used[s]      completes when all warps that read the stage have arrived: it may be overwritten
//
// A warpgroup decodes a step while the tensor cores work on the one before; it waits for arrived[s] in "decode s" and
// arrives at used[s] in "free s":
//
//   warpgroup      decode 0 | issue 0 | decode 1 | issue 1, wait for 0, free 0 | decode 2 | issue 2, wait for 1, ...
//   tensor cores              [--------- products of step 0 ---------][---------- products of step 1 ---------]
//
// Where kSplit > 1, the warpgroups of 64 rows take every kSplit-th step, and the first adds up the sums of all through
// shared memory. Where kCluster > 1, the blocks of a cluster take the same rows of x and different rows of W; each
// copies its part of x[s] to all of them, so used[s] waits for the warps of all.
#pragma once

#include "hopper.cuh"
#include "lut_wide_rows.cuh"
#include "wgmma.cuh"

namespace any4 {

// What an instance of the kernel is compiled for.
//
// kColumns: rows of x that a block takes: 64, 128 or 256.
// kTiles: tiles of 64 rows of W that a block takes, each with warpgroups of its own.
// kSplit: warpgroups of a tile, which take its steps in turns and add up their sums at the end.
// kCluster: blocks that take the same rows of x, of which each copies a part to all.
// kStages: steps whose codes and inputs are in shared memory or on their way there.
// kGroups: 1 for groups of two steps or more; 2 for smaller groups, of which a step may hold two.
// kScale: the type of scales and of offsets; where scales are e8m0, offsets are bfloat16.
template <int kColumns_, int kTiles_, int kSplit_, int kCluster_, int kStages_, int kGroups_, Type kScale_>
struct WideOf {
  static constexpr int kColumns = kColumns_, kTiles = kTiles_, kSplit = kSplit_, kCluster = kCluster_;
  static constexpr int kStages = kStages_, kGroups = kGroups_;
  static constexpr Type kScale = kScale_;

  static constexpr int kConsumers = kTiles * kSplit, kThreads = 128 * (kConsumers + 1), kRows = 64 * kTiles;
  // A step is 64 inputs: 128 bytes of a row of x, within which it can be swizzled, and 32 bytes of a row's codes.
  static constexpr int kInputBytes = kColumns * 128, kCodeBytes = kRows * 32;
  // Of a tile: its results, and the sums of each of its warpgroups but the first.
  static constexpr int kResultBytes = kColumns * 128, kSumBytes = (kSplit - 1) * kColumns * 256;
  static constexpr int kCodesAt = kStages * kInputBytes, kResultsAt = kCodesAt + kStages * kCodeBytes;
  static constexpr int kSumsAt = kResultsAt + kTiles * kResultBytes;
  static constexpr int kBarriersAt = kSumsAt + kTiles * kSumBytes;
  // Dynamic shared memory is aligned to 16 bytes; swizzled rows need an alignment of 1024.
  static constexpr int kSharedBytes = 1024 + kBarriersAt + 2 * kStages * 8;
  // Registers per thread. Of the multiprocessor's 65536, a block never has more than it begins with: the copying
  // warpgroup gives up its own to the others.
  static constexpr int kBeginning = 65536 / kThreads / 8 * 8, kCopying = 24;
  static constexpr int kEqual = (kBeginning * (kConsumers + 1) - kCopying) / kConsumers / 8 * 8;
  static constexpr int kComputing = kEqual > 240 ? 240 : kEqual;
};

// The tensor maps of one product: x [m, k], the codes of the whole stack as bytes [stack * n, k / 2], y [m, n].
struct WideMaps {
  CUtensorMap x, codes, y;
};

template <typename T>
__device__ __forceinline__ uint32_t Round(float low, float high) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

// Adds up the sums of a tile's warpgroups in their order, and starts the copy of the results to y. Of the block's named
// barriers, number 1 + in_block is for all warpgroups of the tile, 8 + in_block for the one that stores the results.
template <typename T, typename Of>
__device__ __forceinline__ void Finish(const WideMaps& maps, const WideGrid& grid, float (&sums)[Of::kColumns / 2],
                                       unsigned char* shared, int tile, int64_t first_row, int in_block, int turn) {
  constexpr int kColumns = Of::kColumns, kThreads = 128 * Of::kSplit;
  const int thread = threadIdx.x % 128, lane = thread % 32, warp = thread / 32, barrier = 1 + in_block;
  if constexpr (Of::kSplit > 1) {
    float* kept = reinterpret_cast<float*>(shared + Of::kSumsAt + in_block * Of::kSumBytes) + thread;
    if (turn > 0) {
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) kept[((turn - 1) * (kColumns / 2) + i) * 128] = sums[i];
    }
    SyncSome(barrier, kThreads);
    if (turn == 0) {
#pragma unroll
      for (int other = 0; other < Of::kSplit - 1; ++other) {
#pragma unroll
        for (int i = 0; i < kColumns / 2; ++i) sums[i] += kept[(other * (kColumns / 2) + i) * 128];
      }
    }
    SyncSome(barrier, kThreads);
    if (turn > 0) return;
  }
  // [rows of x, 64 rows of W], swizzled in 128 bytes.
  const uint32_t results = SharedAddress(shared) + Of::kResultsAt + in_block * Of::kResultBytes;
  const int own = 8 + in_block;
  if (thread == 0) WaitCopiedOut();
  SyncSome(own, 128);
  const int row = lane / 16 * 8 + lane % 8, piece = (2 * warp + lane / 8 % 2) ^ (lane % 8);
#pragma unroll
  for (int j = 0; j < kColumns / 8; j += 2) {
    StoreTransposed(results + (8 * j + row) * 128 + piece * 16, Round<T>(sums[4 * j], sums[4 * j + 1]),
                    Round<T>(sums[4 * j + 2], sums[4 * j + 3]), Round<T>(sums[4 * j + 4], sums[4 * j + 5]),
                    Round<T>(sums[4 * j + 6], sums[4 * j + 7]));
  }
  FenceForCopies();
  SyncSome(own, 128);
  if (thread == 0) CopyOut(maps.y, static_cast<int>(first_row), tile % grid.columns * kColumns, results);
}

// y = x W^T. A cluster computes the tiles of y from number blockIdx.x / kCluster on, gridDim.x / kCluster apart.
template <typename T, typename Of>
__global__ void __launch_bounds__(Of::kThreads, 1)
    LutWide(const __grid_constant__ WideMaps maps, const __grid_constant__ LutWeight stack, const WideGrid grid) {
  constexpr int kColumns = Of::kColumns, kTiles = Of::kTiles, kSplit = Of::kSplit, kCluster = Of::kCluster;
  constexpr int kStages = Of::kStages;
  extern __shared__ unsigned char unaligned[];
  unsigned char* const shared = unaligned + (1024 - SharedAddress(unaligned) % 1024) % 1024;
  const uint32_t base = SharedAddress(shared), arrived = base + Of::kBarriersAt, used = arrived + 8 * kStages;
  const uint32_t rank = RankInCluster<kCluster>();
  const int warpgroup = threadIdx.x / 128;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      InitBarrier(arrived + 8 * i, 1);
      // A stage holds one step, so one warpgroup of each tile reads it, whose four warps arrive.
      InitBarrier(used + 8 * i, 4 * kTiles * kCluster);
    }
  }
  SyncCluster<kCluster>();
  const int first_tile = blockIdx.x / kCluster, tiles_apart = gridDim.x / kCluster;
  const auto row_of = [&](int tile) {
    return (static_cast<int64_t>(tile / grid.columns) * kCluster + rank) * Of::kRows;
  };

  if (warpgroup == Of::kConsumers) {
    GiveRegisters<Of::kCopying>();
    if (threadIdx.x == 128 * Of::kConsumers) {
      constexpr int kPart = kColumns / kCluster;
      const int64_t above = IndexOf(stack) * stack.n;
      uint32_t phases = 0;  // one bit per stage
      for (int tile = first_tile; tile < grid.tiles; tile += tiles_apart) {
        const int row = static_cast<int>(above + row_of(tile)), column = tile % grid.columns * kColumns + rank * kPart;
        for (int step = 0, stage = 0; step < grid.steps; ++step, stage = stage + 1 == kStages ? 0 : stage + 1) {
          // The first time around, there is nothing to wait for: the phase before the first counts as completed.
          Wait(used + 8 * stage, (phases >> stage & 1) ^ 1);
          phases ^= 1u << stage;
          const uint32_t barrier = arrived + 8 * stage;
          ExpectBytes(barrier, Of::kInputBytes + Of::kCodeBytes);
          CopyIn<kCluster>(maps.x, step * kStepInputs, column,
                           base + stage * Of::kInputBytes + rank * (kPart * 128), barrier);
          CopyIn(maps.codes, step * (kStepInputs / 2), row, base + Of::kCodesAt + stage * Of::kCodeBytes, barrier);
        }
      }
    }
  } else {
    TakeRegisters<Of::kComputing>();
    const LutWeight w = TakeOfStack<4>(stack);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const int in_block = warpgroup / kSplit, turn = warpgroup % kSplit;
    // In each tile of y, this warpgroup takes step `turn` and every kSplit-th step after it, and the same stages.
    constexpr int kTurns = kStages / kSplit;
    static_assert(kStages % kSplit == 0 && kTurns % 2 == 0, "a step has the same stage and registers in every round");
    const uint32_t inputs = base + turn * Of::kInputBytes;
    const unsigned char* const codes = shared + Of::kCodesAt + turn * Of::kCodeBytes + in_block * (64 * 32);
    const uint32_t own_arrived = arrived + 8 * turn, own_used = used + 8 * turn;
    uint32_t phases = 0;
    for (int tile = first_tile; tile < grid.tiles; tile += tiles_apart) {
      const int64_t first_row = row_of(tile) + 64 * in_block;
      WideRows<T, Of::kGroups, Of::kScale, Of::kGroups == 1 && kSplit == 1> rows(w, first_row + 16 * warp + lane / 4);
      float sums[kColumns / 2];
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) sums[i] = 0;
      uint32_t a[2][4][4];
      const auto decode = [&](int step, int i) {
        Wait(own_arrived + 8 * kSplit * i, phases >> i & 1);
        phases ^= 1u << i;
        const unsigned char* const from = codes + i * kSplit * Of::kCodeBytes;
        const int later = min(step + 2 * kSplit, grid.steps - 1);
        if (i % 2 == 0) {
          rows.template Decode<0>(from, grid, later, a[0]);
        } else {
          rows.template Decode<1>(from, grid, later, a[1]);
        }
      };
      // This warp no longer reads the stage, and says so to all blocks that copy to it.
      const auto release = [&](int i) {
        __syncwarp();
        if constexpr (kCluster == 1) {
          if (lane == 0) Arrive(own_used + 8 * kSplit * i);
        } else {
          if (lane < kCluster) ArriveAt(own_used + 8 * kSplit * i, lane);
        }
      };
      rows.template Load<0>(grid, min(turn, grid.steps - 1));
      rows.template Load<1>(grid, min(turn + kSplit, grid.steps - 1));
      if (turn < grid.steps) decode(turn, 0);
#pragma unroll 1
      for (int step = turn; step < grid.steps;) {
#pragma unroll
        for (int i = 0; i < kTurns; ++i) {
          const uint64_t described = DescribeRows(inputs + i * kSplit * Of::kInputBytes);
          FenceProducts();
#pragma unroll
          for (int j = 0; j < 4; ++j) WideProduct<T, kColumns>(sums, a[i % 2][j], described + 2 * j);
          CommitProducts();
          WaitProducts<1>();
          if (step > turn) release((i + kTurns - 1) % kTurns);
          step += kSplit;
          if (step >= grid.steps) {
            WaitProducts<0>();
            release(i);
            break;
          }
          decode(step, (i + 1) % kTurns);
        }
      }
      // All products have ended, but nvcc 13.0 doesn't see that: without this line it makes the loop wait for each one.
      WaitProducts<0>();
      Pin(sums);
      Finish<T, Of>(maps, grid, sums, shared, tile, first_row, in_block, turn);
    }
    if (turn == 0 && threadIdx.x % 128 == 0) WaitCopiedOut();
  }
  // A block's shared memory must last as long as another block may arrive at its barriers.
  if constexpr (kCluster > 1) SyncCluster<kCluster>();
}

}  // namespace any4
