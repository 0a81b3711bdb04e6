// Tiles of 16 tokens of a KVQuant cache in shared memory, first their keys and then their values, as numbers.
//
// A tile belongs to one warp. Lane l decodes the channels 32 (l / 8) to 32 (l / 8) + 31 of the tokens l % 8 of each eight,
// or with half as many channels of each sixteen. Codes of the next tile are under way in registers, and outliers in shared
// memory, while a tile is read.
#pragma once

#include "attention_part.cuh"
#include "decode.cuh"
#include "kvquant.h"

namespace any4 {
namespace {

template <int kSize>
struct KVQuantPart {
  static constexpr int kThreads = 384;  // at most
  static constexpr int kTokens = 16;    // of a tile
  static constexpr int kRow = kSize / 8;  // pieces of 16 bytes of a token
  static constexpr int kRowsBytes = kTokens * kSize * 2;
  static constexpr int kSlotBytes = kTokens * kMostOutliers * 2;  // of a tile's outliers, or their channels
  static constexpr int kStageBytes = kRowsBytes + 4 * kSlotBytes;
  static constexpr int kFactors = kSize / 4;                   // pieces of a place's cos and sin, of two pairs each
  static constexpr int kTableBytes = kTurn * kFactors * 16;
  static constexpr int kLevelBytes = 2 * 2 * 4 * 4;  // of keys and values two planes of up to four words

  // Sums replace rows.
  static_assert(kRowsBytes == kHeads * kSize * 4);

  static int SharedBytes(int warps) {
    return warps * (kStageBytes + kFound * 4) + kTableBytes + kLevelBytes + (kHeads * PartOf<kSize>::kQuery + 2 * kSize) * 2 +
           PartOf<kSize>::kPushed * 4;
  }
};

// Which tokens a row sees: those from `first` to `own`, of which those from `coded` to `newest` - 1 are codes.
struct Kept {
  int own, first, coded, newest;

  // A token beyond the last stands for the last.
  __device__ Kept(const KVQuantStep& step, int row) {
    const AttentionStep& token = step.token;
    own = min(token.positions[row], step.room + token.slots - 1);
    first = token.window > 0 ? max(own - token.window + 1, 0) : 0;
    coded = max(first, step.sinks);
    newest = max(own - token.slots + 1, 0);
  }
  __device__ bool Sees(int token) const { return token >= first && token <= own; }
  __device__ bool IsCoded(int token) const { return token >= coded && token < newest; }
};

// A table of levels, as planes of bytes that decode.cuh looks up. `planes` is in shared memory.
template <typename T, int kBits>
__device__ void StoreLevels(const float* levels, uint32_t* planes) {
  constexpr int kWords = Decoder<T, kBits>::kWords;
  const int i = threadIdx.x % 32;
  if (i >= kWords) return;
  uint32_t low = 0, high = 0;
#pragma unroll
  for (int n = 0; n < 4; ++n) {
    const T level = static_cast<T>(__ldg(levels + 4 * i + n));
    const uint32_t bits = *reinterpret_cast<const uint16_t*>(&level);
    low |= (bits & 0xFF) << 8 * n, high |= bits >> 8 << 8 * n;
  }
  planes[i] = low, planes[4 + i] = high;
}

// Keys, or values if kValues.
template <typename T, int kSize, int kBits, bool kValues>
class KVQuantTiles {
 public:
  using Of = KVQuantPart<kSize>;
  static constexpr int kTokens = Of::kTokens;

  // `rows` is the warp's tile, `slots` memory for outliers and their channels; `planes` holds the levels, and `scales` and
  // `offsets` those of a key's channels. The ring and the first tokens are those of the pair.
  __device__ KVQuantTiles(const KVQuantStep& step, const KVQuantCodes& codes, const Kept& kept, int row, int pair,
                          const void* first, const void* ring, char* rows, char* slots, const uint32_t* planes,
                          const T* scales, const T* offsets)
      : step_(step), codes_(codes), kept_(kept), row_(int64_t{row} * step.room), pair_(int64_t{pair} * step.room),
        head_(pair % step.token.groups * kSize), first_(static_cast<const T*>(first) + int64_t{pair} * step.sinks * kSize),
        ring_(static_cast<const T*>(ring) + int64_t{pair} * step.token.slots * kSize), rows_(rows), slots_(slots),
        planes_(planes), scales_(scales), offsets_(offsets) {}

  // Channels 8 i to 8 i + 7 of a token.
  __device__ uint4* Value(int token, int piece) const {
    return reinterpret_cast<uint4*>(rows_) + token * Of::kRow + (piece ^ (token & 7));
  }

  // Begins to load a tile's codes.
  __device__ void Fetch(int tile) {
    if (HasCodes(tile)) {
#pragma unroll
      for (int n = 0; n < kRounds; ++n) {
        const int token = tile * kTokens + Token(n);
        if (token >= step_.room) continue;
        const uint8_t* const from = codes_.planes[0] + (pair_ + token) * kBytes + Part() * (kBytes * 32 / kSize);
        if constexpr (kBits == 4) {
          const uint4 words = __ldg(reinterpret_cast<const uint4*>(from));
          words_[n][0] = words.x, words_[n][1] = words.y, words_[n][2] = words.z, words_[n][3] = words.w;
        } else {
          const uint2 words = __ldg(reinterpret_cast<const uint2*>(from));
          words_[n][0] = words.x, words_[n][1] = words.y;
        }
        if constexpr (kBits == 3) {
          words_[n][2] =
              __ldg(reinterpret_cast<const uint32_t*>(codes_.planes[1] + (pair_ + token) * (kSize / 8) + Part() * 4));
        }
        if constexpr (kValues) range_[n] = __ldg(static_cast<const uint32_t*>(codes_.ranges) + row_ + token);
      }
    }
  }
  // Begins to copy its outliers; the memory must be free.
  __device__ void FetchSlots(int tile) const {
    if (HasCodes(tile) && step_.slots > 0) {
      const int64_t at = (row_ + tile * kTokens) * step_.slots;
      const int count = min(kTokens, step_.room - tile * kTokens) * step_.slots;
      Copy(slots_, static_cast<const char*>(codes_.outliers) + at * 2, count * 2);
      Copy(slots_ + Of::kSlotBytes, static_cast<const char*>(codes_.channels) + at * step_.channel_bytes,
           count * step_.channel_bytes);
    }
    __pipeline_commit();
  }

  // Fills the rows, whose codes and outliers have arrived, and begins to fetch the next tile's. What isn't seen is finite
  // among values.
  __device__ void Fill(int tile, int next, int stop) {
    const bool coded = HasCodes(tile);
    if (coded) Decode(tile);
    if (next < stop) Fetch(next);
    __syncwarp();
    if (coded && step_.slots > 0) step_.channel_bytes == 1 ? Patch<uint8_t>(tile) : Patch<uint16_t>(tile);
    __syncwarp();
    if (next < stop) {
      FetchSlots(next);
    } else {
      __pipeline_commit();
    }
    PutExact(tile);
    __syncwarp();
  }

 private:
  static constexpr int kParts = kSize / 32;                // lanes that share a token
  static constexpr int kAtOnce = 32 / kParts;              // tokens
  static constexpr int kRounds = kTokens / kAtOnce;
  static constexpr int kBytes = kSize / 8 * (kBits == 4 ? 4 : 2);  // of a token's codes in the first plane

  static __device__ int Token(int round) { return round * kAtOnce + threadIdx.x % kAtOnce; }
  static __device__ int Part() { return threadIdx.x % 32 / kAtOnce; }
  __device__ bool HasCodes(int tile) const {
    return tile * kTokens < kept_.newest && (tile + 1) * kTokens > kept_.coded && kept_.coded < kept_.newest;
  }
  // Whole pieces of 16 bytes.
  static __device__ void Copy(char* to, const char* from, int bytes) {
    for (int x = threadIdx.x % 32 * 16; x < bytes; x += 512) __pipeline_memcpy_async(to + x, from + x, 16);
  }

  __device__ void Decode(int tile) const {
    Decoder<T, kBits> decoder;
#pragma unroll
    for (int i = 0; i < Decoder<T, kBits>::kWords; ++i) decoder.low[i] = planes_[i], decoder.high[i] = planes_[4 + i];
#pragma unroll
    for (int eighth = 0; eighth < 4; ++eighth) {
      uint32_t scale[4], offset[4];
      if constexpr (!kValues) {
        Four(scales_ + Part() * 32 + eighth * 8, scale), Four(offsets_ + Part() * 32 + eighth * 8, offset);
      }
#pragma unroll
      for (int n = 0; n < kRounds; ++n) {
        uint32_t numbers[4];
        const bool counts = kept_.IsCoded(tile * kTokens + Token(n));
        decoder.Decode(words_[n], eighth, numbers);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if constexpr (kValues) {
            const uint32_t number = Scaled(numbers[i], __byte_perm(range_[n], 0, 0x1010), __byte_perm(range_[n], 0, 0x3232));
            numbers[i] = counts ? number : 0;
          } else {
            numbers[i] = Scaled(numbers[i], scale[i], offset[i]);
          }
        }
        *Value(Token(n), Part() * 4 + eighth) = uint4{numbers[0], numbers[1], numbers[2], numbers[3]};
      }
    }
  }
  static __device__ void Four(const T* from, uint32_t (&to)[4]) {
    const uint4 four = *reinterpret_cast<const uint4*>(from);
    to[0] = four.x, to[1] = four.y, to[2] = four.z, to[3] = four.w;
  }
  static __device__ uint32_t Scaled(uint32_t levels, uint32_t scales, uint32_t offsets) {
    using Two = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
    const Two two = __hfma2(*reinterpret_cast<const Two*>(&levels), *reinterpret_cast<const Two*>(&scales),
                            *reinterpret_cast<const Two*>(&offsets));
    return *reinterpret_cast<const uint32_t*>(&two);
  }

  // Puts the outliers of this head in their places: a lane has every other slot of a token.
  template <typename Channel>
  __device__ void Patch(int tile) const {
    const int token = threadIdx.x % kTokens, lane = threadIdx.x % 32;
    if (!kept_.IsCoded(tile * kTokens + token)) return;
    const Channel* const channels = reinterpret_cast<const Channel*>(slots_ + Of::kSlotBytes) + token * step_.slots;
    const T* const outliers = reinterpret_cast<const T*>(slots_) + token * step_.slots;
    for (int i = lane / kTokens; i < step_.slots; i += 32 / kTokens) {
      // Channels before the head's are very large numbers.
      const uint32_t channel = channels[i] - static_cast<uint32_t>(head_);
      if (channel < kSize) reinterpret_cast<T*>(Value(token, channel / 8))[channel % 8] = outliers[i];
    }
  }

  // The tokens that are no codes.
  __device__ void PutExact(int tile) const {
    const int begin = tile * kTokens, end = begin + kTokens;
    if (begin >= kept_.coded && end <= kept_.newest) return;
#pragma unroll
    for (int n = 0; n < kTokens * Of::kRow; n += 32) {
      const int x = n + threadIdx.x % 32, row = x / Of::kRow, piece = x % Of::kRow, token = begin + row;
      if (kept_.IsCoded(token)) continue;
      uint4 eight{0, 0, 0, 0};
      if (kept_.Sees(token)) {
        const T* const from = token < step_.sinks ? first_ + int64_t{token} * kSize
                                                  : ring_ + int64_t{token % step_.token.slots} * kSize;
        eight = __ldg(reinterpret_cast<const uint4*>(from) + piece);
      }
      *Value(row, piece) = eight;
    }
  }

  const KVQuantStep& step_;
  const KVQuantCodes& codes_;
  const Kept& kept_;
  const int64_t row_, pair_;
  const int head_;
  const T* const first_;
  const T* const ring_;
  char* const rows_;
  char* const slots_;
  const uint32_t* const planes_;
  const T* const scales_;
  const T* const offsets_;
  uint32_t words_[kRounds][kBits] = {};
  uint32_t range_[kRounds] = {};
};

}  // namespace
}  // namespace any4
