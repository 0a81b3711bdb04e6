// Tiles of 16 of the newest tokens in shared memory, keys and values both numbers. Each belongs to one warp.
//
// Their values are in the ring, but for the new one; so are their keys, or they are codes. Those of a tile are alike.
#pragma once

#include "kivi_numbers.cuh"
#include "kivi_tile.cuh"

namespace any4 {
namespace {

constexpr int kRecent = 16;

template <typename T, int kSize>
class RecentTiles {
 public:
  static constexpr int kRow = kSize / 8;  // pieces of 16 bytes of a token

  __device__ RecentTiles(const KiviStep& step, const Held& held, int64_t pair, uint4* stage)
      : step_(step), held_(held), pair_(pair), keys_(stage), values_(stage + kRecent * kRow) {}

  // The first tile, and how many there are.
  __device__ int first() const { return seen() / kRecent; }
  __device__ int count() const { return held_.own < 0 ? 0 : held_.own / kRecent - first() + 1; }
  // The first token that is seen here.
  __device__ int seen() const { return max(held_.first, held_.tail); }

  __device__ uint4* Key(int row, int piece) const { return keys_ + row * kRow + (piece ^ (row & 7)); }
  __device__ uint4* Value(int row, int piece) const { return values_ + row * kRow + (piece ^ (row & 7)); }

  __device__ void Fetch(int tile) const {
    if (tile * kRecent >= held_.whole) {
      FetchRows(step_.token.keys, tile, keys_);
    } else if ((tile + 1) * kRecent <= step_.key_positions) {
      step_.key_bits == 4 ? DecodeKeys<4>(tile) : DecodeKeys<2>(tile);
    }
    FetchRows(step_.token.values, tile, values_);
    __pipeline_commit();
  }

  // The new token, which the rings may not hold yet, in place of the zeros that were fetched for it.
  __device__ void Patch(int tile, const T* new_key, const T* new_value) const {
    const int lane = threadIdx.x % 32, row = held_.own % kRecent;
    if (held_.own / kRecent != tile || lane >= kRow) return;
    *Key(row, lane) = reinterpret_cast<const uint4*>(new_key)[lane];
    *Value(row, lane) = reinterpret_cast<const uint4*>(new_value)[lane];
  }

 private:
  // From a ring. Tokens that aren't seen, and the new one, become zeros.
  __device__ void FetchRows(const void* ring, int tile, uint4* to) const {
    const int lane = threadIdx.x % 32, slots = step_.token.slots;
    // A ring is a multiple of a tile.
    const T* const from = static_cast<const T*>(ring) + (pair_ * slots + tile * kRecent % slots) * kSize;
#pragma unroll
    for (int n = 0; n < kRecent * kRow; n += 32) {
      const int row = (n + lane) / kRow, piece = (n + lane) % kRow, token = tile * kRecent + row;
      const bool real = token >= seen() && token < held_.own;
      __pipeline_memcpy_async(to + row * kRow + (piece ^ (row & 7)), from + row * kSize + piece * 8, 16, real ? 0 : 16);
    }
  }

  // A lane has kOwn channels of all tokens.
  template <int kBits>
  __device__ void DecodeKeys(int tile) const {
    constexpr int kOwn = kSize / 32;
    const int channel = threadIdx.x % 32 * kOwn;
    const int64_t row = pair_ * kSize + channel, groups = step_.key_positions / step_.group_size;
    uint32_t codes[kOwn][2], steps[kOwn / 2], lowest[kOwn / 2];
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const uint8_t* const from = step_.key_codes + (row + i) * (step_.key_positions / 8 * kBits) + tile * kRecent / 8 * kBits;
      const int64_t at = (row + i) * groups + tile * kRecent / step_.group_size;
      if constexpr (kBits == 4) {
        const uint2 both = *reinterpret_cast<const uint2*>(from);
        codes[i][0] = both.x, codes[i][1] = both.y;
      } else {
        const uint32_t both = *reinterpret_cast<const uint32_t*>(from);
        codes[i][0] = both & 0xFFFF, codes[i][1] = both >> 16;
      }
      const uint32_t step = static_cast<const uint16_t*>(step_.key_steps)[at];
      const uint32_t least = static_cast<const uint16_t*>(step_.key_lowest)[at];
      steps[i / 2] = i % 2 == 0 ? step : steps[i / 2] | step << 16;
      lowest[i / 2] = i % 2 == 0 ? least : lowest[i / 2] | least << 16;
    }
#pragma unroll
    for (int token = 0; token < kRecent; ++token) {
      uint32_t* const to = reinterpret_cast<uint32_t*>(Key(token, channel / 8)) + channel % 8 / 2;
#pragma unroll
      for (int i = 0; i < kOwn; i += 2) {
        to[i / 2] = Decoded<T, kBits>(Paired<kBits>(codes[i][token / 8], codes[i + 1][token / 8], token % 8), steps[i / 2],
                                      lowest[i / 2]);
      }
    }
  }

  const KiviStep& step_;
  const Held& held_;
  const int64_t pair_;
  uint4* const keys_;
  uint4* const values_;
};

}  // namespace
}  // namespace any4
