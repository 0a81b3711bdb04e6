// A group's sums, its least-squares scale and offset, and the search for a better start. One warp computes each of
// them.
//
// any4_jax/refit has the formulas. A sum over a group is taken lane by lane, then across the lanes, whatever else the
// device does: the bits of a row's result depend only on the row.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <math_constants.h>

#include "refit.h"

namespace any4 {
namespace {

constexpr unsigned kAll = 0xffffffffu;

template <class T>
__device__ T WarpSum(T value) {
  for (int step = 16; step > 0; step /= 2) value += __shfl_xor_sync(kAll, value, step);
  return value;
}

// Rounds to the nearest value of the dtype with that many bits of mantissa. Values that are subnormal in float16 become
// zero, as in XLA's reduce_precision. Without a mantissa, to the nearest integer from -127 to 127.
__device__ float Rounded(float value, int mantissa) {
  if (mantissa == 0) return rintf(fminf(fmaxf(value, -127.0f), 127.0f));
  if (mantissa == 7) return __bfloat162float(__float2bfloat16_rn(value));
  if (mantissa == 10) {
    const float half = __half2float(__float2half_rn(value));
    return fabsf(half) < 6.103515625e-5f ? copysignf(0.0f, value) : half;
  }
  return value;
}

template <int kLevels>
struct Table {
  float values[kLevels];   // ascending
  float middles[kLevels];  // between each value and the next

  // The number of the nearest entry; of two as near, the lower.
  __device__ int Code(float value) const {
    int code = 0;
#pragma unroll
    for (int step = kLevels / 2; step > 0; step /= 2) {
      if (value > middles[code + step - 1]) code += step;
    }
    return code;
  }
};

struct Affine {
  float scale, offset;
};

// The weights w of a group with their importance h, and the sums that no fit changes: mass = sum h, the mean of w under
// h, spread = sum h (w - mean)^2.
struct Group {
  const float* w;
  const float* h;
  int length;
  float mass, mean, spread;

  // Calls body(weight, importance) for each of the lane's weights.
  template <class Body>
  __device__ __forceinline__ void ForEach(const Body& body) const {
#pragma unroll 4
    for (int i = threadIdx.x % 32; i < length; i += 32) body(w[i], h[i]);
  }

  __device__ Group(const float* weights, const float* importance, int count)
      : w(weights), h(importance), length(count) {
    float sum = 0, pulled = 0, squares = 0;
    ForEach([&](float weight, float share) {
      sum += share;
      pulled += share * weight;
    });
    mass = WarpSum(sum);
    mean = WarpSum(pulled) / (mass == 0 ? 1.0f : mass);
    ForEach([&](float weight, float share) { squares += share * (weight - mean) * (weight - mean); });
    spread = WarpSum(squares);
  }
};

// Sums over a group, of the level t of each weight: sum h t, sum h t^2, sum h t (w - mean).
struct Moments {
  float t, tt, tw;
};

template <int kLevels>
__device__ Moments MomentsOf(const Group& group, const Table<kLevels>& table, Affine at) {
  // The same for all lanes. With a scale of zero, the levels are the table's ends.
  const float inverse = 1.0f / at.scale;
  Moments sums{0, 0, 0};
  group.ForEach([&](float weight, float share) {
    const float level = table.values[table.Code((weight - at.offset) * inverse)];
    const float mass = share * level;
    sums.t += mass;
    sums.tt += mass * level;
    sums.tw += mass * (weight - group.mean);
  });
  return {WarpSum(sums.t), WarpSum(sums.tt), WarpSum(sums.tw)};
}

// The weighted squared error, for all lanes.
template <int kLevels>
__device__ double ErrorOf(const Group& group, const Table<kLevels>& table, Affine at) {
  const float inverse = 1.0f / at.scale;
  double sum = 0;
  group.ForEach([&](float weight, float share) {
    const float level = table.values[table.Code((weight - at.offset) * inverse)];
    const float gap = weight - (level * at.scale + at.offset);
    sum += share * gap * gap;
  });
  return WarpSum(sum);
}

// The same from the moments: faster, with a relative error of some 1e-5.
__device__ float ErrorFrom(const Group& group, const Moments& sums, Affine at) {
  const float offset = at.offset - group.mean;
  return group.spread + at.scale * (at.scale * sums.tt - 2 * sums.tw) +
         offset * (2 * at.scale * sums.t + offset * group.mass);
}

// The rounded scale and offset of least error for the levels. A group of one level keeps its scale; a group without
// importance keeps its offset.
__device__ Affine LeastSquares(const Group& group, const Moments& sums, Affine old, bool offsets,
                               const RefitOptions& options) {
  const float mean_level = sums.t / (group.mass == 0 ? 1.0f : group.mass);
  // Without offsets, moments about zero, not about the mean: sum h t w.
  const float spread = offsets ? sums.tt - sums.t * mean_level : sums.tt;
  const float product = offsets ? sums.tw : sums.tw + group.mean * sums.t;
  const float scale = product / (spread > 0 ? spread : 1.0f);
  const float rounded = Rounded(spread > 0 && scale > 0 ? scale : old.scale, options.scale_mantissa);
  if (!offsets || group.mass == 0) return {rounded, old.offset};
  return {rounded, Rounded(group.mean - rounded * mean_level, options.offset_mantissa)};
}

// The best of several fits, each from another scale, which shrinks or stretches the range that the table covers while
// one point of it is held.
template <int kLevels>
__device__ Affine Search(const Group& group, const Table<kLevels>& table, Affine start, bool offsets,
                         const RefitOptions& options) {
  float lowest = CUDART_INF_F;
  Affine best = start;
  for (int i = 0; i < options.starts; ++i) {
    Affine at{Rounded(start.scale * options.factors[i], options.scale_mantissa), start.offset};
    if (offsets) {
      const float still = table.values[0] + (table.values[kLevels - 1] - table.values[0]) * options.held[i];
      at.offset = Rounded(start.offset + (start.scale - at.scale) * still, options.offset_mantissa);
    }
    float error = lowest;
    for (int fit = 0; fit < options.fits; ++fit) {
      const Moments sums = MomentsOf(group, table, at);
      at = LeastSquares(group, sums, at, offsets, options);
      error = ErrorFrom(group, sums, at);
    }
    if (error < lowest) {
      lowest = error;
      best = at;
    }
  }
  return best;
}

}  // namespace
}  // namespace any4
