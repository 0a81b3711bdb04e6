// Rotations: of the keys of a tile by their places in a chunk, and of queries back by where the chunk begins. So the
// factors of keys are a small table in shared memory.
//
// Lane l is number q = l % 4 of row r = l / 4. It multiplies the channels of the pieces 2 q and 2 q + 1 (q alone with 64
// channels) and of those half a head further, with which they rotate: of keys, those of the tokens r and r + 8, and of
// queries, those of head r.
#pragma once

#include "kvquant_tile.cuh"

namespace any4 {
namespace {

template <typename T>
__device__ __forceinline__ float2 Wide(uint32_t pair) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  } else {
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u)};
  }
}

template <typename T>
__device__ __forceinline__ uint32_t Narrow(float a, float b) {
  if constexpr (std::is_same_v<T, __half>) {
    const __half2 pair = __floats2half2_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(a, b);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
}

// The factors of the places of a chunk: (cos, sin) of two pairs of channels in a piece of 16 bytes, of which those that a
// warp reads at once lie in different banks.
template <int kSize>
class Places {
 public:
  using Of = KVQuantPart<kSize>;

  __device__ explicit Places(char* memory) : memory_(reinterpret_cast<float4*>(memory)) {}

  // All threads; __syncthreads() must follow.
  __device__ void Store(const float* cos, const float* sin) const {
    if (cos == nullptr) return;
    for (int x = threadIdx.x; x < kTurn * Of::kFactors; x += blockDim.x) {
      const float2 c = __ldg(reinterpret_cast<const float2*>(cos) + x), s = __ldg(reinterpret_cast<const float2*>(sin) + x);
      *At(x / Of::kFactors, x % Of::kFactors) = float4{c.x, s.x, c.y, s.y};
    }
  }
  __device__ float4* At(int place, int piece) const {
    return memory_ + place * Of::kFactors + (piece ^ (piece / 8 & 3) ^ (place & 1) * (kSize / 32));
  }

 private:
  float4* const memory_;
};

template <typename T, int kSize>
class TurnedQueries {
 public:
  static constexpr int kPieces = kSize / 64;  // of a lane
  static constexpr int kHalf = kSize / 2;

  // `queries` are those of the lane's head.
  __device__ TurnedQueries(const KVQuantStep& step, const T* queries) : step_(step), queries_(queries) {}

  // For the keys of a chunk.
  __device__ void Turn(int chunk) {
    if (chunk == chunk_ || (step_.cos == nullptr && chunk_ >= 0)) return;
    chunk_ = chunk;
    // The amplitude is in the queries and in the keys' factors already.
    const float unit = step_.cos == nullptr ? 1 : 1 / __ldg(step_.cos);
#pragma unroll
    for (int p = 0; p < kPieces; ++p) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int channel = 8 * Piece(p) + 2 * i;
        float2 low = Wide<T>(*reinterpret_cast<const uint32_t*>(queries_ + channel));
        float2 high = Wide<T>(*reinterpret_cast<const uint32_t*>(queries_ + kHalf + channel));
        if (step_.cos != nullptr) {
          const int64_t at = int64_t{chunk} * kHalf + channel;
          float2 cos = __ldg(reinterpret_cast<const float2*>(step_.turn_cos + at));
          float2 sin = __ldg(reinterpret_cast<const float2*>(step_.turn_sin + at));
          cos.x *= unit, cos.y *= unit, sin.x *= unit, sin.y *= unit;
          const float2 a = low, b = high;
          low = {a.x * cos.x + b.x * sin.x, a.y * cos.y + b.y * sin.y};
          high = {b.x * cos.x - a.x * sin.x, b.y * cos.y - a.y * sin.y};
        }
        const Split<T> first(low.x, low.y), second(high.x, high.y);
        // The rows of the other eight heads, of which there are none, take what rounding leaves.
        a_[p][i][0] = first.high, a_[p][i][1] = first.low, a_[p][i][2] = second.high, a_[p][i][3] = second.low;
      }
    }
  }

  // The scores of the tokens 8 (i / 2) + 2 q + i % 2 of a tile.
  template <typename Tiles>
  __device__ void Products(const Tiles& tiles, const Places<kSize>& places, int tile, float (&scores)[4]) const {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int token = 8 * half + threadIdx.x % 32 / 4, place = (tile * Tiles::kTokens + token) % kTurn;
      float sums[4] = {};
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        const uint4 a = *tiles.Value(token, Piece(p)), b = *tiles.Value(token, Piece(p) + kHalf / 8);
        uint32_t low[4] = {a.x, a.y, a.z, a.w}, high[4] = {b.x, b.y, b.z, b.w};
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (step_.cos != nullptr) {
            const float4 factors = *places.At(place, 4 * Piece(p) + i);
            const float2 x = Wide<T>(low[i]), y = Wide<T>(high[i]);
            low[i] = Narrow<T>(x.x * factors.x - y.x * factors.y, x.y * factors.z - y.y * factors.w);
            high[i] = Narrow<T>(y.x * factors.x + x.x * factors.y, y.y * factors.z + x.y * factors.w);
          }
          MultiplyAdd<T>(sums, a_[p][i], low[i], high[i]);
        }
      }
      scores[2 * half] = sums[0] + sums[2], scores[2 * half + 1] = sums[1] + sums[3];
    }
  }

 private:
  static __device__ int Piece(int p) { return threadIdx.x % 4 * kPieces + p; }

  const KVQuantStep& step_;
  const T* const queries_;
  int chunk_ = -1;
  uint32_t a_[kPieces][4][4];
};

}  // namespace
}  // namespace any4
