// Tiles of 64 tokens, keys and values both codes, in shared memory.
//
// A tile belongs to one warp. Four warps are a team, and their tiles, side by side, are a quad: they copy its keys
// together, since memory is read in pieces of 128 bytes and a channel's codes of one tile are 16 or 32 of them.
//
// Lane l is number q = l % 4 of row r = l / 4. Of the keys it decodes tokens 8 r to 8 r + 7 in the channels 16 k + 4 q to
// 16 k + 4 q + 3, and of the values tokens 16 q to 16 q + 15 in the channels of part r of eight. Pieces of 16 bytes are
// shuffled so that what a warp reads at once lies in different banks.
#pragma once

#include "attention_part.cuh"
#include "kivi.h"

namespace any4 {
namespace {

constexpr int kTokens = 64;

template <int kSize>
struct KiviPart {
  static constexpr int kSide = 4;  // warps of a team
  // At most: three teams, and a warp for the newest tokens. A fourth would leave each thread too few registers.
  static constexpr int kThreads = 32 * (3 * kSide + 1);
  static constexpr int kCodeBytes = kTokens * kSize / 2;            // at most, of keys or values
  static constexpr int kKeyFactors = kSize * 4;                     // bytes of the steps of two groups, or of the lowest
  static constexpr int kValueFactors = kTokens * (kSize / 32) * 2;  // likewise, at most, of groups of 32
  // The tiles of a team begin in different banks.
  static constexpr int kTileBytes = 2 * (kCodeBytes + kKeyFactors + kValueFactors) + 32;
  static constexpr int kLane = kSize / 8;  // channels of the values that a lane decodes

  static int SharedBytes(int warps) {
    return warps * (kTileBytes + kFound * 4) + (kHeads * PartOf<kSize>::kQuery + 2 * kSize) * 2 +
           PartOf<kSize>::kPushed * 4;
  }
};

// How a row's tokens are held; see kivi.h.
struct Held {
  int own;    // the new token
  int first;  // the first that it sees
  int whole;  // keys before it are codes
  int coded;  // values before it are codes
  int tail;   // tokens before it were codes before this step, keys and values

  // A token beyond the last stands for the last.
  __device__ Held(const KiviStep& step, int row) {
    const AttentionStep& token = step.token;
    own = min(token.positions[row], step.value_positions + token.slots - 1);
    first = token.window > 0 ? max(own - token.window + 1, 0) : 0;
    whole = own - max(own, 0) % token.slots;
    coded = max(own - token.slots + 1, 0);
    tail = max(coded - 1, 0);
  }
  // Its value leaves the ring.
  __device__ int leaving() const { return coded - 1; }
  // Whether the warp that attends to it makes codes of that value.
  __device__ bool SeesLeaving() const { return coded > first; }
};

template <typename T, int kSize>
class CodeTiles {
 public:
  using Of = KiviPart<kSize>;

  // `stage` is the team's.
  __device__ CodeTiles(const KiviStep& step, const Held& held, int64_t pair, char* stage)
      : step_(step), held_(held), pair_(pair), team_(stage),
        keys_(stage + threadIdx.x / 32 % Of::kSide * Of::kTileBytes),
        value_groups_(max(kSize / step.group_size, 1)), groups_shift_(value_groups_ / 2) {}

  // Whether some of its tokens are seen here.
  __device__ bool Counts(int tile) const { return tile * kTokens < held_.tail && (tile + 1) * kTokens > held_.first; }
  // All threads of a team.
  __device__ void SyncTeam() const {
    asm volatile("bar.sync %0, %1;" ::"r"(1 + static_cast<int>(threadIdx.x) / (32 * Of::kSide)), "n"(32 * Of::kSide)
                 : "memory");
  }

  // By a team, the keys of a quad.
  template <int kBits>
  __device__ void FetchKeys(int quad) const {
    constexpr int kEach = kBits / 2, kPieces = Of::kSide * kEach, kChannels = 32 * Of::kSide / kPieces;
    const int thread = threadIdx.x % (32 * Of::kSide), piece = thread % kPieces, channel = thread / kPieces;
    const int64_t pitch = step_.key_positions / 8 * kBits;
    if (Fits(quad * Of::kSide + piece / kEach)) {
      const uint8_t* from = step_.key_codes + (pair_ * kSize + channel) * pitch + (quad * kPieces + piece) * 16;
      char* to = team_ + piece / kEach * Of::kTileBytes + (Row(channel) * kEach + piece % kEach) * 16;
#pragma unroll
      for (int c = 0; c < kSize; c += kChannels) {
        __pipeline_memcpy_async(to, from, 16);
        from += kChannels * pitch, to += kChannels * kEach * 16;
      }
    }
    const int side = thread % Of::kSide, tile = quad * Of::kSide + side;
    if (!Fits(tile)) return;
    // Of two groups, the first of which has an even number: a pair of them is a multiple of a tile.
    const int64_t groups = step_.key_positions / step_.group_size;
    int64_t at = (pair_ * kSize + thread / Of::kSide) * groups + (tile * kTokens / step_.group_size & ~1);
    char* to = team_ + side * Of::kTileBytes + Of::kCodeBytes + thread / Of::kSide * 4;
#pragma unroll
    for (int c = 0; c < kSize; c += 32) {
      __pipeline_memcpy_async(to, static_cast<const T*>(step_.key_steps) + at, 4);
      __pipeline_memcpy_async(to + Of::kKeyFactors, static_cast<const T*>(step_.key_lowest) + at, 4);
      at += 32 * groups, to += 128;
    }
  }

  // By a warp, the values of its tile.
  template <int kBits>
  __device__ void FetchValues(int tile) const {
    if (!Counts(tile)) return;
    constexpr int kBytes = kSize / 8 * kBits;
    const int lane = threadIdx.x % 32;
    const int64_t first = pair_ * step_.value_positions + tile * kTokens;
    const uint8_t* const codes = step_.value_codes + first * kBytes;
#pragma unroll
    for (int n = 0; n < kTokens * kBytes / 16; n += 32) {
      const int x = n + lane;
      __pipeline_memcpy_async(Values() + Place<kBytes / 8>(x) * 16, codes + x * 16, 16);
    }
    const int64_t at = first * value_groups_ + lane * 8;
    if (lane < kTokens / 8 * value_groups_) {
      const int place = Place<1>(lane) * 16;
      __pipeline_memcpy_async(ValueSteps() + place, static_cast<const T*>(step_.value_steps) + at, 16);
      __pipeline_memcpy_async(ValueLowest() + place, static_cast<const T*>(step_.value_lowest) + at, 16);
    }
  }

  // The codes of the lane's eight tokens in channel 16 k + 4 q + i, lowest bits first.
  template <int kBits>
  __device__ uint32_t KeyCodes(int k, int i) const {
    const int r = threadIdx.x % 32 / 4, q = threadIdx.x % 4;
    const char* const row = keys_ + (16 * k + 4 * i + q) * 8 * kBits;
    if constexpr (kBits == 4) return *reinterpret_cast<const uint32_t*>(row + 4 * r);
    return *reinterpret_cast<const uint16_t*>(row + 2 * r);
  }
  // Steps or lowest values of the lane's four channels, each with those of both groups.
  __device__ uint4 KeySteps(int k) const { return *reinterpret_cast<const uint4*>(KeySteps() + Channels(k)); }
  __device__ uint4 KeyLowest(int k) const { return *reinterpret_cast<const uint4*>(KeyLowest() + Channels(k)); }
  // Which of both groups the lane's tokens belong to.
  __device__ bool IsSecond(int tile) const {
    return (tile * kTokens + threadIdx.x % 32 / 4 * 8) / step_.group_size % 2 != 0;
  }

  // The codes of token 16 q + i in the lane's channels, in one word for each eight of them, of which there are kLane / 8.
  template <int kBits>
  __device__ void ValueCodes(int i, uint32_t (&words)[Of::kLane / 8]) const {
    constexpr int kBytes = kSize / 8 * kBits, kChunk = kBytes / 8;
    const int at = (threadIdx.x % 4 * 16 + i) * kBytes + threadIdx.x % 32 / 4 * kChunk;
    const char* const from = Values() + Place<kBytes / 8>(at / 16) * 16 + at % 16;
    if constexpr (kBits == 4 && kSize == 128) {
      const uint2 both = *reinterpret_cast<const uint2*>(from);
      words[0] = both.x, words[1] = both.y;
    } else if constexpr (kBits == 4) {
      words[0] = *reinterpret_cast<const uint32_t*>(from);
    } else if constexpr (kSize == 128) {
      const uint32_t both = *reinterpret_cast<const uint32_t*>(from);
      words[0] = both & 0xFFFF, words[1] = both >> 16;
    } else {
      words[0] = *reinterpret_cast<const uint16_t*>(from);
    }
  }
  // Step and lowest value, as the low and the high half, of the lane's channels in the tokens 16 q + i and the next.
  __device__ void ValueFactors(int i, uint32_t& steps, uint32_t& lowest) const {
    const int group = threadIdx.x % 32 / 4 * Of::kLane / min(step_.group_size, kSize);
    const int at = ((threadIdx.x % 4 * 16 + i) << groups_shift_) + group, next = 2 << groups_shift_;
    const int from = Place<1>(at / 8) * 16 + at % 8 * 2;
    steps = Pair(ValueSteps() + from, next), lowest = Pair(ValueLowest() + from, next);
  }

 private:
  __device__ bool Fits(int tile) const { return Counts(tile) && (tile + 1) * kTokens <= step_.key_positions; }
  // Four consecutive channels lie 64 or 128 bytes apart, so that the lanes' rows are side by side.
  static __device__ int Row(int channel) { return (channel & ~15) | (channel & 3) << 2 | (channel >> 2 & 3); }
  static __device__ int Channels(int k) { return (16 * k + threadIdx.x % 4 * 4) * 4; }
  // The place of a piece of a tile's values. The lanes' tokens are 16 apart, which is kLines times 128 bytes.
  template <int kLines>
  static __device__ int Place(int x) {
    return x ^ (x / 8 / kLines * 2 & 7);
  }
  static __device__ uint32_t Pair(const char* from, int next) {
    return *reinterpret_cast<const uint16_t*>(from) |
           static_cast<uint32_t>(*reinterpret_cast<const uint16_t*>(from + next)) << 16;
  }
  __device__ char* KeySteps() const { return keys_ + Of::kCodeBytes; }
  __device__ char* KeyLowest() const { return KeySteps() + Of::kKeyFactors; }
  __device__ char* Values() const { return KeyLowest() + Of::kKeyFactors; }
  __device__ char* ValueSteps() const { return Values() + Of::kCodeBytes; }
  __device__ char* ValueLowest() const { return ValueSteps() + Of::kValueFactors; }

  const KiviStep& step_;
  const Held& held_;
  const int64_t pair_;
  char* const team_;
  char* const keys_;
  const int value_groups_, groups_shift_;
};

}  // namespace
}  // namespace any4
