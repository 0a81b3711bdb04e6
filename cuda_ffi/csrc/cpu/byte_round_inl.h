// x rounded to bytes in the order of byte_kernel.h, over a vector type V; see byte_kernel_inl.h.

// Rounds kGroup floats to integers with one scale, which it returns. Where a value is not finite, the scale, and so all
// that it multiplies, is NaN.
template <class V>
inline float RoundGroup(const float* x, int32_t* q) {
  // Of magnitudes, the bits are in the order of the numbers, with infinity and NaN at the end.
  int32_t largest_bits = 0;
  for (int i = 0; i < kGroup; ++i) {
    int32_t bits;
    __builtin_memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffff;
    largest_bits = bits > largest_bits ? bits : largest_bits;
  }
  if (largest_bits >= 0x7f800000) {
    for (int i = 0; i < kGroup; ++i) q[i] = 0;
    return ToFloat(uint32_t{0x7fc00000});
  }
  // As quantized_input.py does it: what is smaller than 2^-100 counts as zero, since its inverse may overflow.
  const float magnitude = ToFloat(static_cast<uint32_t>(largest_bits));
  const float largest = magnitude < 0x1p-100f ? 1.0f : magnitude;
  const auto inverse = V::Broadcast(127.0f / largest);
  for (int i = 0; i < kGroup; i += V::kLanes) {
    V::StoreInts(q + i, V::Nearest(V::Multiply(V::LoadFloats(x + i), inverse)));
  }
  return largest * (1.0f / 127.0f);
}

template <class V, int kBits>
void RoundRow(const void* x, Type type, const ByteInput& in, int64_t row) {
  constexpr int64_t kLanes = V::kLanes, kStep = 8 * kLanes, kHalf = kStep / 2, kGroups = kStep / kGroup;
  const auto ones = V::Ones();
  float* const sums = in.sums + row * in.groups;
  for (int64_t g = 0; g < in.groups; ++g) sums[g] = 0;
  for (int64_t step = 0; step < in.steps; ++step) {
    int8_t* const values = in.values + (row * in.steps + step) * kStep;
    int32_t* const starts = in.starts + (row * in.steps + step) * kLanes;
    float* const scales = in.scales + (row * in.steps + step) * kLanes;
    for (int64_t b = 0; b < kGroups; ++b) {
      const int64_t first = step * kStep + b * kGroup, left = in.k - first;
      float group[kGroup];
      if (left >= kGroup) {
        Widen(x, type, row * in.k + first, kGroup, group);
      } else {
        for (float& value : group) value = 0;
        if (left > 0) Widen(x, type, row * in.k + first, left, group);
      }
      int32_t q[kGroup];
      const float scale = RoundGroup<V>(group, q);
      for (int lane = 0; lane < 4; ++lane) scales[b * 4 + lane] = scale;
      for (int i = 0; i < 16; ++i) {
        values[b * 16 + i] = static_cast<int8_t>(q[kBits == 4 ? 2 * i : i]);
        values[kHalf + b * 16 + i] = static_cast<int8_t>(q[kBits == 4 ? 2 * i + 1 : 16 + i]);
      }
    }
    V::StoreInts(starts, V::Dot(V::Dot(V::Zero(), ones, V::Load(values)), ones, V::Load(values + kHalf)));
    for (int64_t b = 0; b < kGroups; ++b) {
      const int64_t first = step * kStep + b * kGroup;
      const int32_t sum = starts[4 * b] + starts[4 * b + 1] + starts[4 * b + 2] + starts[4 * b + 3];
      if (first < in.k) sums[in.groups == 1 ? 0 : first / in.group_size] += scales[4 * b] * static_cast<float>(sum);
    }
    for (int lane = 0; lane < kLanes; ++lane) starts[lane] *= -128;
  }
}
