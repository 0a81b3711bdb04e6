// Codes of a tile of 64 tokens in shared memory. A tile belongs to one warp, like those of attention_part.cuh.
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
  static constexpr int kThreads = 512;
  static constexpr int kSide = 4;  // tiles side by side that a block takes
  static constexpr int kCodeBytes = kTokens * kSize / 2;            // at most, of keys or values
  static constexpr int kKeyFactors = kSize * 4;                     // bytes of the steps of two groups, or of the lowest
  static constexpr int kValueFactors = kTokens * (kSize / 32) * 2;  // likewise, at most, of groups of 32
  static constexpr int kTileBytes = 2 * (kCodeBytes + kKeyFactors + kValueFactors);
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

  // A token beyond the last stands for the last.
  __device__ Held(const KiviStep& step, int row) {
    const AttentionStep& token = step.token;
    own = min(token.positions[row], step.value_positions + token.slots - 1);
    first = token.window > 0 ? max(own - token.window + 1, 0) : 0;
    whole = own - max(own, 0) % token.slots;
    coded = max(own - token.slots + 1, 0);
  }
  __device__ bool Sees(int token) const { return token >= first && token <= own; }
  // Its value leaves the ring.
  __device__ int leaving() const { return coded - 1; }
  // Whether the warp that attends to its tile makes codes of that value.
  __device__ bool SeesLeaving() const { return coded > first; }
};

template <typename T, int kSize>
class CodeTiles {
 public:
  using Of = KiviPart<kSize>;

  __device__ CodeTiles(const KiviStep& step, const Held& held, int64_t pair, uint4* stage)
      : step_(step), held_(held), pair_(pair), keys_(reinterpret_cast<char*>(stage)),
        value_groups_(max(kSize / step.group_size, 1)), groups_shift_(value_groups_ / 2) {}

  __device__ bool HasKeys(int tile) const { return tile * kTokens < held_.whole; }
  __device__ bool HasValues(int tile) const { return tile * kTokens < held_.coded; }

  __device__ void FetchKeys(int tile) const {
    if (!HasKeys(tile) || (tile + 1) * kTokens > step_.key_positions) return;
    const int lane = threadIdx.x % 32, pieces = step_.key_bits / 2;
    const int64_t pitch = step_.key_positions / 8 * step_.key_bits, groups = step_.key_positions / step_.group_size;
    const uint8_t* const codes = step_.key_codes + pair_ * kSize * pitch + tile * kTokens / 8 * step_.key_bits;
#pragma unroll 4
    for (int x = lane; x < kSize * pieces; x += 32) {
      const int channel = x / pieces, part = x % pieces;
      __pipeline_memcpy_async(keys_ + (Row(channel) * pieces + part) * 16, codes + channel * pitch + part * 16, 16);
    }
    // Of two groups, the first of which has an even number: a pair of them is a multiple of a tile.
    const int64_t first = pair_ * kSize * groups + (tile * kTokens / step_.group_size & ~1);
#pragma unroll
    for (int channel = lane; channel < kSize; channel += 32) {
      const int64_t at = first + channel * groups;
      __pipeline_memcpy_async(KeySteps() + channel * 4, static_cast<const T*>(step_.key_steps) + at, 4);
      __pipeline_memcpy_async(KeyLowest() + channel * 4, static_cast<const T*>(step_.key_lowest) + at, 4);
    }
  }

  __device__ void FetchValues(int tile) const {
    if (!HasValues(tile)) return;
    const int lane = threadIdx.x % 32, bytes = kSize / 8 * step_.value_bits;
    const int64_t first = pair_ * step_.value_positions + tile * kTokens;
    const uint8_t* const codes = step_.value_codes + first * bytes;
#pragma unroll 4
    for (int x = lane; x < kTokens / 16 * bytes; x += 32) {
      __pipeline_memcpy_async(Values() + Place(x, bytes) * 16, codes + x * 16, 16);
    }
    const int64_t at = first * value_groups_ + lane * 8;
    if (lane < kTokens / 8 * value_groups_) {
      const int place = Place(lane, 2 * value_groups_) * 16;
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
    const char* const from = Values() + Place(at / 16, kBytes) * 16 + at % 16;
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
    const int at = FactorAt(threadIdx.x % 4 * 16 + i, group), next = 2 << groups_shift_;
    steps = Pair(ValueSteps() + at, next), lowest = Pair(ValueLowest() + at, next);
  }

  // Where a word of a token's codes is, and a factor of one of its groups, to change what was fetched.
  __device__ uint32_t* ValueWord(int token, int word) const {
    const int bytes = kSize / 8 * step_.value_bits, at = token * bytes + word * 4;
    return reinterpret_cast<uint32_t*>(Values() + Place(at / 16, bytes) * 16 + at % 16);
  }
  __device__ T& ValueStep(int token, int group) const { return *reinterpret_cast<T*>(ValueSteps() + FactorAt(token, group)); }
  __device__ T& ValueLeast(int token, int group) const {
    return *reinterpret_cast<T*>(ValueLowest() + FactorAt(token, group));
  }

 private:
  // Four consecutive channels lie 64 or 128 bytes apart, so that the lanes' rows are side by side.
  static __device__ int Row(int channel) { return (channel & ~15) | (channel & 3) << 2 | (channel >> 2 & 3); }
  static __device__ int Channels(int k) { return (16 * k + threadIdx.x % 4 * 4) * 4; }
  // The place of piece x of tokens that have so many bytes each: the lanes' tokens are 16 apart.
  static __device__ int Place(int x, int bytes) {
    const int lines = max(bytes / 8, 1);
    return x ^ (x / 8 / lines * 2 & 7);
  }
  __device__ int FactorAt(int token, int group) const {
    const int at = (token << groups_shift_) + group;
    return Place(at / 8, 2 << groups_shift_) * 16 + at % 8 * 2;
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
  char* const keys_;
  const int value_groups_, groups_shift_;
};

}  // namespace
}  // namespace any4
