// AVX2: a byte shuffle looks up 32 weights. The one product of bytes, of bytes without a sign by bytes with one, adds
// pairs in 16 bits with saturation: |q| by weights that take the sign of q stay below, unless a weight is -128.
#include "byte_kernel.h"

#if defined(__AVX2__)

#include <immintrin.h>

namespace any4 {
namespace byte_avx2 {

#include "byte_kernel_inl.h"
#include "byte_vector256_inl.h"

struct Vector : Vector256 {
  static constexpr bool kUnsigned = false, kHoldsLowest = false;
  static constexpr int kRowsOfOne = 4, kRows = 2, kInputs = 2;
  using Table = SignedTable;

  static Ints Dot(Ints sum, Bytes weights, Bytes q) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(q), _mm256_sign_epi8(weights, q));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
};

// Weights without a sign, up to 255: their even and their odd bytes are multiplied in 16 bits.
struct Wide : Vector256 {
  static constexpr bool kUnsigned = true, kHoldsLowest = true;
  static constexpr int kRowsOfOne = 2, kRows = 2, kInputs = 2;
  using Table = UnsignedTable;

  static Ints Dot(Ints sum, Bytes weights, Bytes q) {
    const __m256i even = _mm256_madd_epi16(_mm256_and_si256(weights, _mm256_set1_epi16(255)),
                                           _mm256_srai_epi16(_mm256_slli_epi16(q, 8), 8));
    const __m256i odd = _mm256_madd_epi16(_mm256_srli_epi16(weights, 8), _mm256_srai_epi16(q, 8));
    return _mm256_add_epi32(sum, _mm256_add_epi32(even, odd));
  }
};

}  // namespace byte_avx2

const ByteKernel* Avx2ByteKernel() { return byte_avx2::ByteKernelOf<byte_avx2::Vector, byte_avx2::Wide>::Get(); }

}  // namespace any4

#else

namespace any4 {
const ByteKernel* Avx2ByteKernel() { return nullptr; }
}  // namespace any4

#endif
