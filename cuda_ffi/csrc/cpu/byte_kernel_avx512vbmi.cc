// AVX-512 with VNNI and VBMI: the byte permute reads 6 bits of an index, and finds a table of 16 bytes at all four
// places, so that the bits above a code need not be cleared.
#include "byte_kernel.h"

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)

#include <immintrin.h>

namespace any4 {
namespace byte_avx512vbmi {

#include "byte_kernel_inl.h"
#include "byte_vector512_inl.h"

struct Vector : Vector512 {
  static Bytes Low(Bytes codes) { return codes; }
  static Bytes High(Bytes codes) { return _mm512_srli_epi16(codes, 4); }

  struct Table : Vector512::Table {
    Bytes Look(Bytes index) const { return _mm512_permutexvar_epi8(index, values); }
  };
};

}  // namespace byte_avx512vbmi

const ByteKernel* Avx512VbmiByteKernel() {
  using byte_avx512vbmi::Vector;
  return byte_avx512vbmi::ByteKernelOf<Vector>::Get();
}

}  // namespace any4

#else

namespace any4 {
const ByteKernel* Avx512VbmiByteKernel() { return nullptr; }
}  // namespace any4

#endif
