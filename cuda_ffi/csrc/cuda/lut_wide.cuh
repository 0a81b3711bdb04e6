// LutWide: the product for many rows of x with 4-bit codes, on Hopper; lut_wide.md has what was measured.
//
// A block stays on its multiprocessor and computes one tile of y after another: kRows rows of W by kColumns rows of x.
// Its last warpgroup copies; the others decode and multiply. Here kTiles = 2, and kSplit, kSharers and kParts are 1:
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
// Where kSplit > 1, the warpgroups of 64 rows take every kSplit-th pair of steps, and the first adds up the sums of all
// through shared memory. Where kSharers > 1, the blocks of a cluster take the same rows of x and different rows of W;
// each copies its part of x[s] to all of them, so used[s] waits for the warps of all. Where kParts = 2, the two blocks
// of a cluster compute one tile, each half of K. Then each sends the other its sums of half the columns, to where that
// one's stages were, adds up the rest and stores it. Such a cluster computes one tile only.
#pragma once

#include "hopper.cuh"
#include "lut_wide_results.cuh"
#include "lut_wide_rows.cuh"
#include "wgmma.cuh"

namespace any4 {

// What an instance of the kernel is compiled for.
//
// kColumns: rows of x that a block takes: 64, 128 or 256.
// kTiles: tiles of 64 rows of W that a block takes, each with warpgroups of its own.
// kSplit: warpgroups of a tile, which take pairs of its steps in turns and add up their sums at the end.
// kSharers: blocks of a cluster that take the same rows of x and different rows of W; each copies a part of x to all.
// kParts: 2 where two blocks of a cluster take a part of K each and add up their sums at the end; else 1.
// kStages: steps whose codes and inputs are in shared memory or on their way there.
// kGroups: 1 for groups of two steps or more; 2 for smaller groups, of which a step may hold two.
// kScale: the type of scales and of offsets; where scales are e8m0, offsets are bfloat16.
template <int kColumns_, int kTiles_, int kSplit_, int kSharers_, int kParts_, int kStages_, int kGroups_, Type kScale_>
struct WideOf {
  static constexpr int kColumns = kColumns_, kTiles = kTiles_, kSplit = kSplit_, kSharers = kSharers_;
  static constexpr int kParts = kParts_, kStages = kStages_, kGroups = kGroups_, kCluster = kSharers * kParts;
  static constexpr Type kScale = kScale_;

  static_assert(kParts == 1 || (kParts == 2 && kSharers == 1));

  // Rows of x whose results a block stores.
  static constexpr int kShareColumns = kColumns / kParts;
  static constexpr int kConsumers = kTiles * kSplit, kThreads = 128 * (kConsumers + 1), kRows = 64 * kTiles;
  // A step is 64 inputs: 128 bytes of a row of x, within which it can be swizzled, and 32 bytes of a row's codes.
  static constexpr int kInputBytes = kColumns * 128, kCodeBytes = kRows * 32;
  // Of a tile: its results, and the sums of each of its warpgroups but the first.
  static constexpr int kResultBytes = kShareColumns * 128, kSumBytes = (kSplit - 1) * kColumns * 256;
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

// y = x W^T. A cluster computes the tiles of y from number blockIdx.x / kCluster on, gridDim.x / kCluster apart.
template <typename T, typename Of>
__global__ void __launch_bounds__(Of::kThreads, 1)
    LutWide(const __grid_constant__ WideMaps maps, const __grid_constant__ LutWeight stack, const WideGrid grid) {
  constexpr int kColumns = Of::kColumns, kTiles = Of::kTiles, kSplit = Of::kSplit, kCluster = Of::kCluster;
  constexpr int kStages = Of::kStages, kSharers = Of::kSharers;
  extern __shared__ unsigned char unaligned[];
  unsigned char* const shared = unaligned + (1024 - SharedAddress(unaligned) % 1024) % 1024;
  const uint32_t base = SharedAddress(shared), arrived = base + Of::kBarriersAt, used = arrived + 8 * kStages;
  const uint32_t rank = RankInCluster<kCluster>();
  const uint32_t part = rank / kSharers, sharer = rank % kSharers;  // one of them is 0
  // The shuffle tells the compiler that all lanes have the same number.
  const int warpgroup = __shfl_sync(0xFFFFFFFF, static_cast<int>(threadIdx.x / 128), 0);
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      InitBarrier(arrived + 8 * i, 1);
      // A stage holds one step, so one warpgroup of each tile reads it, whose four warps arrive.
      InitBarrier(used + 8 * i, 4 * kTiles * kSharers);
    }
  }
  // Where K is split, AddParts lets the blocks meet.
  SyncCluster<kSharers>();
  const int first_tile = blockIdx.x / kCluster, tiles_apart = gridDim.x / kCluster;
  const auto row_of = [&](int tile) {
    return (static_cast<int64_t>(tile / grid.columns) * kSharers + sharer) * Of::kRows;
  };
  // This block's part of a row's steps.
  const int begin = Of::kParts == 1 ? 0 : part * grid.part_steps, end = min(begin + grid.part_steps, grid.steps);

  if (warpgroup == Of::kConsumers) {
    GiveRegisters<Of::kCopying>();
    if (threadIdx.x == 128 * Of::kConsumers) {
      constexpr int kOwn = kColumns / kSharers;
      const int64_t above = IndexOf(stack) * stack.n;
      uint32_t phases = 0;  // one bit per stage
      for (int tile = first_tile; tile < grid.tiles; tile += tiles_apart) {
        const int row = static_cast<int>(above + row_of(tile)), column = tile % grid.columns * kColumns + sharer * kOwn;
        for (int step = begin, stage = 0; step < end; ++step, stage = stage + 1 == kStages ? 0 : stage + 1) {
          // The first time around, there is nothing to wait for: the phase before the first counts as completed.
          Wait(used + 8 * stage, (phases >> stage & 1) ^ 1);
          phases ^= 1u << stage;
          const uint32_t barrier = arrived + 8 * stage;
          ExpectBytes(barrier, Of::kInputBytes + Of::kCodeBytes);
          CopyIn<kSharers>(maps.x, step * kStepInputs, column,
                           base + stage * Of::kInputBytes + sharer * (kOwn * 128), barrier);
          CopyIn(maps.codes, step * (kStepInputs / 2), row, base + Of::kCodesAt + stage * Of::kCodeBytes, barrier);
        }
      }
    }
    if constexpr (Of::kParts > 1) {
      // The barriers of AddParts are for all threads of the cluster.
      SyncCluster<kCluster>();
      SyncCluster<kCluster>();
    }
  } else {
    TakeRegisters<Of::kComputing>();
    const LutWeight w = TakeOfStack<4>(stack);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    const int in_block = warpgroup / kSplit, turn = warpgroup % kSplit;
    // In each tile of y, this warpgroup takes pair number `turn` of steps and every kSplit-th pair after it, and the
    // same stages: `stage_of` its i-th step, counted from the first.
    constexpr int kTurns = kStages / kSplit;
    static_assert(kStages % kSplit == 0 && kTurns % 2 == 0, "a step has the same stage and registers in every round");
    const auto stage_of = [](int i) { return i / 2 * (2 * kSplit) + i % 2; };
    const uint32_t inputs = base + 2 * turn * Of::kInputBytes;
    const unsigned char* const codes = shared + Of::kCodesAt + 2 * turn * Of::kCodeBytes + in_block * (64 * 32);
    const uint32_t own_arrived = arrived + 16 * turn, own_used = used + 16 * turn;
    uint32_t phases = 0;
    for (int tile = first_tile; tile < grid.tiles; tile += tiles_apart) {
      const int64_t first_row = row_of(tile) + 64 * in_block;
      WideRows<T, Of::kGroups, Of::kScale> rows(w, first_row + 16 * warp + lane / 4);
      float sums[kColumns / 2];
#pragma unroll
      for (int i = 0; i < kColumns / 2; ++i) sums[i] = 0;
      uint32_t a[2][4][4];
      const auto decode = [&](int step, int i) {
        Wait(own_arrived + 8 * stage_of(i), phases >> i & 1);
        phases ^= 1u << i;
        const unsigned char* const from = codes + stage_of(i) * Of::kCodeBytes;
        const int later = min(step + 2 * kSplit, end - 1);
        if (i % 2 == 0) {
          rows.template Decode<0>(from, grid, later, a[0]);
        } else {
          rows.template Decode<1>(from, grid, later, a[1]);
        }
      };
      // This warp no longer reads the stage, and says so to all blocks that copy to it.
      const auto release = [&](int i) {
        __syncwarp();
        if constexpr (kSharers == 1) {
          if (lane == 0) Arrive(own_used + 8 * stage_of(i));
        } else {
          if (lane < kSharers) ArriveAt(own_used + 8 * stage_of(i), lane);
        }
      };
      const int first_step = begin + 2 * turn;
      rows.template Load<0>(grid, min(first_step, end - 1));
      if constexpr (Of::kGroups > 1) rows.template Load<1>(grid, min(first_step + 1, end - 1));
      if (first_step < end) decode(first_step, 0);
#pragma unroll 1
      for (int step = first_step; step < end;) {
#pragma unroll
        for (int i = 0; i < kTurns; ++i) {
          const uint32_t described = DescribeRows(inputs + stage_of(i) * Of::kInputBytes);
          FenceProducts();
#pragma unroll
          for (int j = 0; j < 4; ++j) WideProduct<T, kColumns>(sums, a[i % 2][j], described + 2 * j);
          CommitProducts();
          WaitProducts<1>();
          if (step > first_step) release((i + kTurns - 1) % kTurns);
          step += i % 2 == 0 ? 1 : 2 * kSplit - 1;
          if (step >= end) {
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
      if constexpr (Of::kParts > 1) ArriveInCluster();
      AddTurns<Of>(sums, shared, in_block, turn);
      if constexpr (Of::kParts > 1) AddParts<Of>(sums, shared, in_block, turn, part);
      const int column = tile % grid.columns * kColumns + part * Of::kShareColumns;
      if (turn == 0) StoreResults<T, Of>(maps.y, sums, shared, first_row, column, in_block);
    }
    if (turn == 0 && threadIdx.x % 128 == 0) WaitCopiedOut();
  }
  // A block's shared memory must last as long as another block may arrive at its barriers.
  if constexpr (kSharers > 1) SyncCluster<kSharers>();
}

}  // namespace any4
