// AVX-512 with VNNI: a byte shuffle within each 128 bits looks up 64 weights, one instruction multiplies them.
#include "byte_kernel.h"

#if defined(__AVX512VNNI__)

#include <immintrin.h>

namespace any4 {
namespace byte_avx512vnni {

#include "byte_kernel_inl.h"
#include "byte_vector512_inl.h"

struct Vector : Vector512 {
  static Bytes Low(Bytes codes) { return _mm512_and_si512(codes, _mm512_set1_epi8(15)); }
  static Bytes High(Bytes codes) { return Low(_mm512_srli_epi16(codes, 4)); }

  struct Table : Vector512::Table {
    Bytes Look(Bytes index) const { return _mm512_shuffle_epi8(values, index); }
  };
};

}  // namespace byte_avx512vnni

const ByteKernel* Avx512VnniByteKernel() {
  using byte_avx512vnni::Vector;
  return byte_avx512vnni::ByteKernelOf<Vector>::Get();
}

}  // namespace any4

#else

namespace any4 {
const ByteKernel* Avx512VnniByteKernel() { return nullptr; }
}  // namespace any4

#endif
