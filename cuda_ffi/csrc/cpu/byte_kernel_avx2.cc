// AVX2: a byte shuffle looks up 32 weights. The one product of bytes, of bytes without a sign by bytes with one, adds
// pairs in 16 bits with saturation. Magnitudes of weights, up to 128, by inputs that take their sign stay below.
#include "byte_kernel.h"

#if defined(__AVX2__)

#include <immintrin.h>

namespace any4 {
namespace byte_avx2 {

#include "byte_kernel_inl.h"
#include "byte_vector256_inl.h"

struct Vector : Vector256 {
  static constexpr bool kUnsigned = false;
  static constexpr int kRowsOfOne = 2, kRows = 1, kInputs = 8, kTokenInputs = 2;
  using TokenWeight = int16_t;
  using TokenQ = int16_t;
  using Table = SignedTable;

  static void Whole(const uint8_t* codes, Bytes* low, Bytes* high) {
    Vector256::Whole(codes, low, high);
    *low = _mm256_xor_si256(*low, _mm256_set1_epi8(-128));
    *high = _mm256_xor_si256(*high, _mm256_set1_epi8(-128));
  }
  static Ints Dot(Ints sum, Bytes weights, Bytes q) {
    const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(weights), _mm256_sign_epi8(q, weights));
    return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static Bytes LoadCodes(const uint8_t* codes) {
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes));
    return _mm256_cvtepi8_epi16(_mm_xor_si128(bytes, _mm_set1_epi8(-128)));
  }
  // Of 16 bits, which need neither signs apart nor a second multiplication.
  static Ints TokenDot(Ints sum, Bytes weights, Bytes q) {
    // In place, where GCC else copies every sum in every step.
    asm("vpaddd %1, %0, %0" : "+x"(sum) : "x"(_mm256_madd_epi16(weights, q)));
    return sum;
  }
};

}  // namespace byte_avx2

const ByteKernel* Avx2ByteKernel() { return byte_avx2::ByteKernelOf<byte_avx2::Vector>::Get(); }

}  // namespace any4

#else

namespace any4 {
const ByteKernel* Avx2ByteKernel() { return nullptr; }
}  // namespace any4

#endif
