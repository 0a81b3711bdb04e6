// x rounded to bytes in the order of byte_kernel.h, over a vector type V; see byte_kernel_inl.h.

// kGroup numbers of x from `first` on as floats, or the `left` that there are and zeros; those of a float32 in place.
__attribute__((noinline)) static const float* GroupOf(const void* x, Type type, int64_t first, int64_t left, float* buffer) {
  if (left >= kGroup && type == Type::kFloat32) return static_cast<const float*>(x) + first;
  for (int64_t i = 0; i < kGroup; ++i) buffer[i] = 0;
  if (left > 0) Widen(x, type, first, left < kGroup ? left : kGroup, buffer);
  return buffer;
}

// Rounds kGroup floats to bytes with one scale, which it returns: even and odd ones apart where codes have 4 bits, else
// the first and the second half. Where a value is not finite, the scale, and so all that it multiplies, is NaN.
template <class V, int kBits>
inline float RoundGroup(const float* x, int8_t* low, int8_t* high) {
  constexpr int kVectors = kGroup / V::kLanes;
  typename V::Floats values[kVectors];
  typename V::Ints q[kVectors];
  for (int i = 0; i < kVectors; ++i) values[i] = V::LoadFloats(x + i * V::kLanes);
  // Of magnitudes, the bits are in the order of the numbers, with infinity and NaN at the end.
  auto largest_bits = V::Magnitude(values[0]);
  for (int i = 1; i < kVectors; ++i) largest_bits = V::Larger(largest_bits, V::Magnitude(values[i]));
  const float magnitude = ToFloat(static_cast<uint32_t>(V::Largest(largest_bits)));
  const bool finite = magnitude < __builtin_inff();
  // As quantized_input.py does it: what is smaller than 2^-100 counts as zero, since its inverse may overflow.
  const float largest = magnitude < 0x1p-100f ? 1.0f : magnitude;
  const auto inverse = V::Broadcast(127.0f / largest);
  for (int i = 0; i < kVectors; ++i) q[i] = finite ? V::Nearest(V::Multiply(values[i], inverse)) : V::Zero();
  V::template StoreGroup<kBits>(q, low, high);
  return finite ? largest * (1.0f / 127.0f) : ToFloat(uint32_t{0x7fc00000});
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
      float buffer[kGroup];
      const float* const from = GroupOf(x, type, row * in.k + first, left, buffer);
      const float scale = RoundGroup<V, kBits>(from, values + b * 16, values + kHalf + b * 16);
      for (int lane = 0; lane < 4; ++lane) scales[b * 4 + lane] = scale;
    }
    V::StoreInts(starts, V::Dot(V::Dot(V::Zero(), ones, V::Load(values)), ones, V::Load(values + kHalf)));
    for (int64_t b = 0; b < kGroups; ++b) {
      const int64_t first = step * kStep + b * kGroup;
      const int32_t sum = starts[4 * b] + starts[4 * b + 1] + starts[4 * b + 2] + starts[4 * b + 3];
      in.totals[(row * in.steps + step) * kGroups + b] = -128 * sum;
      if (first < in.k) sums[in.groups == 1 ? 0 : first / in.group_size] += scales[4 * b] * static_cast<float>(sum);
    }
    for (int lane = 0; lane < kLanes; ++lane) starts[lane] *= -128;
  }
}
