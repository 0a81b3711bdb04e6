// A row of x rounded to integers with one scale; see byte_token_inl.h.

// q = round(x * inverse) + zero, and x = scale * (q - zero).
struct Grid {
  float inverse, scale, zero;
};

// As quantized_input.py finds it. Where a value is not finite, the scale, and so all that it multiplies, is NaN.
__attribute__((noinline)) static Grid FindGrid(const void* x, Type type, const Rounding& rounding, int64_t begin, int64_t k) {
  float low[kGroup] = {}, high[kGroup] = {}, buffer[kGroup];
  // Not of type bool, of which the compiler makes no vectors.
  int32_t infinite[kGroup] = {};
  for (int64_t first = 0; first < k; first += kGroup) {
    const float* const from = GroupOf(x, type, begin + first, k - first, buffer);
    for (int64_t i = 0; i < kGroup; ++i) {
      low[i] = from[i] < low[i] ? from[i] : low[i];
      high[i] = from[i] > high[i] ? from[i] : high[i];
      infinite[i] |= __builtin_fabsf(from[i]) < __builtin_inff() ? 0 : 1;
    }
  }
  for (int64_t i = 1; i < kGroup; ++i) {
    low[0] = low[i] < low[0] ? low[i] : low[0];
    high[0] = high[i] > high[0] ? high[i] : high[0];
    infinite[0] |= infinite[i];
  }
  if (infinite[0] != 0) return {0, ToFloat(uint32_t{0x7fc00000}), 0};
  const float half = static_cast<float>(1 << (rounding.bits - 1));
  // What is smaller than 2^-100 counts as zero, since its inverse may overflow.
  if (rounding.symmetric) {
    const float magnitude = -low[0] > high[0] ? -low[0] : high[0], largest = magnitude < 0x1p-100f ? 1.0f : magnitude;
    return {(half - 1) / largest, largest * (1.0f / (half - 1)), 0};
  }
  const float difference = high[0] - low[0], span = difference < 0x1p-100f ? 1.0f : difference;
  const float inverse = (2 * half - 1) / span;
  return {inverse, span * (1.0f / (2 * half - 1)), -half - __builtin_rintf(low[0] * inverse)};
}

template <class V>
void RoundToken(const void* x, Type type, const Rounding& rounding, const TokenInput& in, int64_t begin, int64_t row) {
  using Item = typename V::TokenQ;
  constexpr int64_t kItems = sizeof(typename V::Bytes) / sizeof(Item);
  auto* const values = static_cast<Item*>(in.values) + row * in.stride;
  const bool ones = row == in.ones;
  Grid grid{0, 1, 1};
  if (!ones && rounding.given != nullptr) {
    const float* const given = rounding.given + (rounding.given_rows == 1 ? 0 : 3 * (begin + row));
    grid = {given[0], given[1], given[2]};
  } else if (!ones) {
    grid = FindGrid(x, type, rounding, (begin + row) * in.k, in.k);
  }
  const float half = static_cast<float>(1 << (rounding.bits - 1));
  const float least = -half - grid.zero, most = half - 1 - grid.zero;
  // Added to a number of less than 2^22, it leaves no bits for fractions: the compiler makes vectors of that.
  constexpr float kRounder = 0x1.8p23f;
  int32_t unknown = 0;
  for (int64_t g = 0; g < in.groups; ++g) {
    const int64_t first = g * in.group_size, left = in.k - first, count = left < in.group_size ? left : in.group_size;
    Item* const to = values + g * in.group_steps * kItems;
    int32_t sum = 0;
    for (int64_t at = 0; at < count; at += kGroup) {
      const int64_t n = count - at < kGroup ? count - at : kGroup;
      float buffer[kGroup];
      int32_t q[kGroup];
      if (ones) {
        for (int32_t& value : q) value = 1;
      } else {
        const float* const from = GroupOf(x, type, (begin + row) * in.k + first + at, n, buffer);
        for (int64_t i = 0; i < kGroup; ++i) {
          unknown |= from[i] == from[i] ? 0 : 1;
          // A NaN, which fails comparisons, becomes the least.
          float value = from[i] * grid.inverse;
          value = value >= least ? value : least;
          value = value <= most ? value : most;
          q[i] = static_cast<int32_t>(((value + kRounder) - kRounder) + grid.zero);
        }
      }
      for (int64_t i = 0; i < n; ++i) sum += q[i];
      for (int64_t i = 0; i < n; ++i) to[at + i] = static_cast<Item>(q[i]);
    }
    for (int64_t i = count; i < in.Steps(g) * kItems; ++i) to[i] = 0;
    in.sums[row * in.groups + g] = static_cast<float>(sum);
    if constexpr (V::kUnsigned) {
      auto sums = V::Zero();
      for (int64_t step = 0; step < in.Steps(g); ++step) {
        sums = V::TokenDot(sums, V::Ones(), V::Load(to + step * kItems));
      }
      int32_t* const starts = in.starts + (row * in.groups + g) * V::kLanes;
      V::StoreInts(starts, sums);
      for (int lane = 0; lane < V::kLanes; ++lane) starts[lane] *= -128;
    }
  }
  in.scales[row] = unknown == 0 ? grid.scale : ToFloat(uint32_t{0x7fc00000});
  in.zeros[row] = grid.zero;
}
