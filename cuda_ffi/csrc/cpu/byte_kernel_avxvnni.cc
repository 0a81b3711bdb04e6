// AVX-VNNI: one instruction multiplies 32 bytes without a sign by 32 with one, and adds fours of them in 32 bits.
#include "byte_kernel.h"

#if defined(__AVXVNNI__)

#include <immintrin.h>

namespace any4 {
namespace byte_avxvnni {

#include "byte_kernel_inl.h"
#include "byte_vector256_inl.h"

struct Vector : Vector256 {
  static constexpr bool kUnsigned = true;
  static constexpr int kRowsOfOne = 2, kRows = 1, kInputs = 8, kTokenInputs = 2;
  using TokenWeight = uint8_t;
  using TokenQ = int8_t;
  using Table = UnsignedTable;

  static Ints TokenDot(Ints sum, Bytes weights, Bytes q) { return Dot(sum, weights, q); }
  static Ints Dot(Ints sum, Bytes weights, Bytes q) { return _mm256_dpbusd_avx_epi32(sum, weights, q); }
};

}  // namespace byte_avxvnni

const ByteKernel* AvxVnniByteKernel() {
  using byte_avxvnni::Vector;
  return byte_avxvnni::ByteKernelOf<Vector>::Get();
}

}  // namespace any4

#else

namespace any4 {
const ByteKernel* AvxVnniByteKernel() { return nullptr; }
}  // namespace any4

#endif
