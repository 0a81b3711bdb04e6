// The product as a C function, for callers that have device pointers and a stream but no XLA: a benchmark that captures
// launches in its own graph, as it does for other libraries.
#include "lut_product.h"

// y [m, n] = x [m, k] W^T, with all floating arrays in bfloat16 and 4-bit codes. `lut` holds a table for each row of W,
// or a single one if `one_table` is set; `offsets` may be null. Returns the launch's error, 0 for none.
extern "C" int any4_cuda_lut_product_plain(const void* x, int64_t m, const void* codes, const void* lut,
                                           const void* scales, const void* offsets, void* y, int64_t n, int64_t k,
                                           int64_t group_size, int one_table, cudaStream_t stream) {
  any4::LutWeight w{};
  w.codes = static_cast<const uint8_t*>(codes);
  w.lut = lut;
  w.scales = scales;
  w.offsets = offsets;
  w.stack = 1;
  w.n = n;
  w.k = k;
  w.groups = (k + group_size - 1) / group_size;
  w.lut_stride = one_table != 0 ? 0 : 16;
  w.lut_type = w.scale_type = w.offset_type = any4::Type::kBfloat16;
  return any4::LutProducts(&w, &y, 1, 4, group_size, x, m, any4::Type::kBfloat16, stream);
}
