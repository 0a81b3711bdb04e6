// The dense product of rows of x and decoded rows of the weight; see lut_kernel_inl.h.

// sums[r][d] += x[r] . decoded[d] over `count` floats, for kRows rows of x and kDecodedRows of the weight.
template <class V, int kRows>
void Tile(const float* x, int64_t x_stride, const float* decoded, int64_t count, float* sums, int64_t sums_stride) {
  using Float = typename V::Float;
  Float sum[kRows][kDecodedRows];
  for (auto& of_row : sum) {
    for (Float& s : of_row) s = V::Zero();
  }
  for (int64_t i = 0; i < count; i += V::kLanes) {
    Float weight[kDecodedRows];
    for (int d = 0; d < kDecodedRows; ++d) weight[d] = V::Load(decoded + d * kDecodedStride + i);
    for (int r = 0; r < kRows; ++r) {
      const Float values = V::Load(x + r * x_stride + i);
      for (int d = 0; d < kDecodedRows; ++d) sum[r][d] = V::Fma(values, weight[d], sum[r][d]);
    }
  }
  for (int r = 0; r < kRows; ++r) {
    for (int d = 0; d < kDecodedRows; ++d) sums[r * sums_stride + d] += V::Sum(sum[r][d]);
  }
}

// All rows of x by kDecodedRows decoded rows, as many rows of x at a time as registers allow.
template <class V, int kRows>
void Tiles(const float* x, int64_t rows, int64_t x_stride, const float* decoded, int64_t count, float* sums) {
  int64_t r = 0;
  for (; r + kRows <= rows; r += kRows) {
    Tile<V, kRows>(x + r * x_stride, x_stride, decoded, count, sums + r * kTaskRows, kTaskRows);
  }
  if constexpr (kRows > 1) {
    if (r < rows) Tiles<V, kRows - 1>(x + r * x_stride, rows - r, x_stride, decoded, count, sums + r * kTaskRows);
  }
}
