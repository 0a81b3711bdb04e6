// Decodes W to a dense matrix, for products of so many rows of x that the dense product is faster.
#include "lut_general.cuh"
#include "lut_product.h"

namespace any4 {
namespace {

constexpr int kRowsOfBlock = 8, kInputsOfStep = 256, kSteps = 8;

__device__ __forceinline__ float2 ToFloats(uint32_t pair, const __nv_bfloat16*) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
}

__device__ __forceinline__ float2 ToFloats(uint32_t pair, const __half*) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

// Loads the codes of eight inputs to where Decoder looks for a lane's first eight.
template <int kBits>
__device__ __forceinline__ void LoadEight(const LutWeight& w, int64_t at, uint32_t (&words)[kBits]) {
  if constexpr (kBits == 8) {
    const uint2 v = __ldg(reinterpret_cast<const uint2*>(w.codes + at));
    words[0] = v.x, words[1] = v.y;
  } else if constexpr (kBits == 4) {
    words[0] = __ldg(reinterpret_cast<const uint32_t*>(w.codes + at / 2));
  } else {
    words[0] = __ldg(reinterpret_cast<const uint16_t*>(w.codes + at / 4));
    if constexpr (kBits == 3) words[2] = __ldg(w.high + at / 8);
  }
}

// A warp takes kSteps * kInputsOfStep inputs of a row, eight per lane and step, so that it stores 512 contiguous bytes
// and the loads of all steps are in flight at once. The group of an input is input >> group_shift.
template <typename T, int kBits>
__global__ void __launch_bounds__(32 * kRowsOfBlock)
    Dequantize(const __grid_constant__ LutWeight stack, T* out, const int group_shift) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kRowsOfBlock + threadIdx.y;
  if (row >= stack.n) return;
  const LutWeight w = TakeOfStack<kBits>(stack);
  const int64_t first = static_cast<int64_t>(blockIdx.y) * (kSteps * kInputsOfStep) + 8 * threadIdx.x;
  uint32_t words[kSteps][kBits] = {}, scales[kSteps], offsets[kSteps] = {};
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int64_t input = first + i * kInputsOfStep;
    if (input >= w.k) break;
    LoadEight<kBits>(w, row * w.k + input, words[i]);
    // Inputs that pad the row have no group of their own.
    const int64_t group = row * w.groups + min(input >> group_shift, w.groups - 1);
    scales[i] = LoadRaw(w.scales, w.scale_type, group);
    if (w.offsets != nullptr) offsets[i] = LoadRaw(w.offsets, w.offset_type, group);
  }
  Decoder<T, kBits> table;
  table.Load(w, row);
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
    const int64_t input = first + i * kInputsOfStep;
    if (input >= w.k) break;
    float scale = FromRaw(scales[i], w.scale_type);
    float offset = w.offsets == nullptr ? 0.0f : FromRaw(offsets[i], w.offset_type);
    table.Affine(scale, offset);
    uint32_t values[4];
    table.Decode(words[i], 0, values);
    T dense[8];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 pair = ToFloats(values[j], out);
      dense[2 * j] = static_cast<T>(fmaf(pair.x, scale, offset));
      dense[2 * j + 1] = static_cast<T>(fmaf(pair.y, scale, offset));
    }
    *reinterpret_cast<uint4*>(out + row * w.k + input) = reinterpret_cast<const uint4&>(dense);
  }
}

template <typename T>
cudaError_t OfBits(const LutWeight& w, int bits, int64_t group_size, T* out, cudaStream_t stream) {
  int shift = 0;
  while (int64_t{1} << shift < group_size) ++shift;
  const int64_t inputs = kSteps * kInputsOfStep;
  const dim3 blocks(static_cast<unsigned>((w.n + kRowsOfBlock - 1) / kRowsOfBlock),
                    static_cast<unsigned>((w.k + inputs - 1) / inputs));
  const dim3 threads(32, kRowsOfBlock);
  switch (bits) {
    case 2: Dequantize<T, 2><<<blocks, threads, 0, stream>>>(w, out, shift); break;
    case 3: Dequantize<T, 3><<<blocks, threads, 0, stream>>>(w, out, shift); break;
    case 4: Dequantize<T, 4><<<blocks, threads, 0, stream>>>(w, out, shift); break;
    default: Dequantize<T, 8><<<blocks, threads, 0, stream>>>(w, out, shift); break;
  }
  return cudaGetLastError();
}

}  // namespace

cudaError_t LutDequantize(const LutWeight& w, int bits, int64_t group_size, void* out, Type type, cudaStream_t stream) {
  return type == Type::kFloat16 ? OfBits(w, bits, group_size, static_cast<__half*>(out), stream)
                                : OfBits(w, bits, group_size, static_cast<__nv_bfloat16*>(out), stream);
}

}  // namespace any4
