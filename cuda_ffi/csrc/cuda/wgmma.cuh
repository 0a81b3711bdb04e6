// A warpgroup's product: 64 rows of W from registers by 64 to 256 rows of x from shared memory.
//
// Only the first operand of wgmma may come from registers, and decoded weights are nowhere else: so W is the first
// operand, and results are [rows of W, rows of x], however many there are of either.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace any4 {

// Describes rows of 64 two-byte elements in shared memory, whose 16-byte pieces are swizzled within 128 bytes. Eight
// rows are 1024 bytes, and must be aligned to that. This is the lower half, where the address is: adding 2 moves it on
// by 16 elements. The upper half is the same for all such rows, 0x40000040: the swizzle, and eight rows in 16 bytes.
__device__ __forceinline__ uint32_t DescribeRows(uint32_t shared_address) {
  return 1u << 16 | (shared_address & 0x3FFFF) >> 4;
}

// Orders accesses to registers before the products that follow: call it before the first product of a set.
__device__ __forceinline__ void FenceProducts() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

// Closes a set of products.
__device__ __forceinline__ void CommitProducts() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kSets sets are in flight.
template <int kSets>
__device__ __forceinline__ void WaitProducts() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kSets) : "memory");
}

// Keeps the compiler from moving uses of these registers across this place.
template <int kCount>
__device__ __forceinline__ void Pin(float (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(registers[i])::"memory");
}

template <int kCount>
__device__ __forceinline__ void Pin(uint32_t (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// sums += a b for 16 inputs. In lane 4 g + t of warp w, a[0] and a[1] are inputs 2t and 2t + 1 of rows 16 w + g and 16
// w + g + 8 of W; a[2] and a[3] are the same rows, 8 inputs on; sums[4 j + 2 h + i] is row 16 w + g + 8 h of W and row
// 8 j + 2 t + i of x.
template <typename T, int kColumns>
__device__ __forceinline__ void WideProduct(float (&sums)[kColumns / 2], const uint32_t (&a)[4], uint32_t b);

#define ANY4_4(i) "+f"(s[i]), "+f"(s[i + 1]), "+f"(s[i + 2]), "+f"(s[i + 3])
#define ANY4_16(i) ANY4_4(i), ANY4_4(i + 4), ANY4_4(i + 8), ANY4_4(i + 12)
#define ANY4_32(i) ANY4_16(i), ANY4_16(i + 16)

#define ANY4_SUMS_64 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28," \
  "%29,%30,%31"
#define ANY4_OPERANDS_64 ANY4_32(0)

#define ANY4_SUMS_128 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28," \
  "%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55," \
  "%56,%57,%58,%59,%60,%61,%62,%63"
#define ANY4_OPERANDS_128 ANY4_32(0), ANY4_32(32)

#define ANY4_SUMS_256 \
  "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28," \
  "%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55," \
  "%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82," \
  "%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107," \
  "%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
#define ANY4_OPERANDS_256 ANY4_32(0), ANY4_32(32), ANY4_32(64), ANY4_32(96)

#define ANY4_WIDE_PRODUCT(T, type, n, a0, a1, a2, a3, b)                                                             \
  template <>                                                                                                        \
  __device__ __forceinline__ void WideProduct<T, n>(float (&s)[n / 2], const uint32_t (&a)[4], uint32_t b_rows) {    \
    asm volatile("{.reg .pred add; setp.eq.b32 add, 0, 0; .reg .b64 b; mov.b64 b, {%" #b ", 0x40000040};\n"          \
                 "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" ANY4_SUMS_##n                  \
                 "}, {%" #a0 ",%" #a1 ",%" #a2 ",%" #a3 "}, b, add, 1, 1, 0;}"                                       \
                 : ANY4_OPERANDS_##n                                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b_rows));                                         \
  }

ANY4_WIDE_PRODUCT(__nv_bfloat16, "bf16", 64, 32, 33, 34, 35, 36)
ANY4_WIDE_PRODUCT(__nv_bfloat16, "bf16", 128, 64, 65, 66, 67, 68)
ANY4_WIDE_PRODUCT(__nv_bfloat16, "bf16", 256, 128, 129, 130, 131, 132)
ANY4_WIDE_PRODUCT(__half, "f16", 64, 32, 33, 34, 35, 36)
ANY4_WIDE_PRODUCT(__half, "f16", 128, 64, 65, 66, 67, 68)
ANY4_WIDE_PRODUCT(__half, "f16", 256, 128, 129, 130, 131, 132)

#undef ANY4_4
#undef ANY4_16
#undef ANY4_32
#undef ANY4_SUMS_64
#undef ANY4_OPERANDS_64
#undef ANY4_SUMS_128
#undef ANY4_OPERANDS_128
#undef ANY4_SUMS_256
#undef ANY4_OPERANDS_256
#undef ANY4_WIDE_PRODUCT

}  // namespace any4
