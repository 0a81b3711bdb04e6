// XLA's entry point to the step of a dense cache: it checks what Python passed, writes the new tokens, and shares the
// slots among XLA's threads.
#include <algorithm>
#include <string>
#include <string_view>

#include "attention_parts.h"
#include "dense.h"
#include "handler.h"
#include "isa.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using any4::Has;
using Any = ffi::AnyBuffer;
using Floats = ffi::Buffer<ffi::F32>;
using Integers = ffi::Buffer<ffi::S32>;

// Multiply-adds that take a thread less time than it takes to wake another, some 10 us.
constexpr int64_t kWakingWork = int64_t{1} << 19;

ffi::Error Invalid(const std::string& message) { return ffi::Error::InvalidArgument("any4_cpu_attention: " + message); }

// The mixtures of all heads by parts of the slots that their tokens see.
void AttendInBlocks(const any4::Executor& executor, const any4::DenseStep& step, const any4::DenseKernel& kernel,
                    const any4::Output& out) {
  int64_t last = -1;
  for (int64_t token = 0; token < step.rows * step.tokens; ++token) last = std::max(last, step.own(token));
  const int64_t blocks = step.rows * step.groups * step.blocks();
  // Several blocks are tasks enough for threads to share.
  const int64_t length = step.blocks() > 1 ? step.slots : any4::kTaskTokens, parts = last < 0 ? 0 : last / length + 1;
  const int64_t shared = step.shared(), pitch = any4::kAttentionSums + step.size, of_part = step.block_heads() * pitch;
  const auto found = any4::Allocate<float>(blocks * parts * of_part);
  any4::ForTasks(executor, blocks * parts, kernel.scratch_bytes(step), [&](int64_t i, char* scratch) {
    const int64_t begin = i % parts * length, block = i / parts;
    kernel.attend(step, block / step.blocks(), block % step.blocks(), begin, begin + length, found.get() + i * of_part,
                  scratch);
  });
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t pair = block / step.blocks(), oldest = block % step.blocks() * any4::kBlockTokens;
    const int64_t heads = std::min(any4::kBlockTokens, step.tokens - oldest) * shared;
    const int64_t first = (pair / step.groups * step.tokens + oldest) * step.heads + pair % step.groups * shared;
    for (int64_t h = 0; h < heads; ++h) {
      const float* const of_head = found.get() + block * parts * of_part + h * pitch;
      kernel.combine(of_head, parts, of_part, step.size, first + h / shared * step.heads + h % shared, out);
    }
  }
}

// The results' keys, values and length have the memory of the operands.
ffi::Error Step(ffi::ThreadPool pool, Any queries, Any new_keys, Any new_values, Any keys, Any values, Integers length,
                Integers positions, Integers start, Floats cos, Floats sin, ffi::Result<Any> mixed,
                ffi::Result<Any> keys_out, ffi::Result<Any> values_out, ffi::Result<Integers> length_out, float scale,
                float softcap, int64_t window, std::string_view isa_name) {
  const auto isa = any4::IsaNamed(isa_name);
  if (!isa) return Invalid(any4::LacksIsa(isa_name));
  const auto type = any4::TypeOf(queries);
  if (!any4::IsFloat(type)) return Invalid("need float32 or bfloat16");
  for (const Any& each : {new_keys, new_values, keys, values, Any(*mixed), Any(*keys_out), Any(*values_out)}) {
    if (each.element_type() != queries.element_type()) return Invalid("its operands differ in dtype");
  }
  if (keys_out->untyped_data() != keys.untyped_data() || values_out->untyped_data() != values.untyped_data()) {
    return Invalid("the cache must be given away");
  }
  if (queries.dimensions().size() != 4 || new_keys.dimensions().size() != 4 || keys.dimensions().size() != 3) {
    return Invalid("need four axes, and three of the cache");
  }
  const bool rotates = cos.element_count() > 0;
  const any4::DenseStep step{queries.untyped_data(), new_keys.untyped_data(), new_values.untyped_data(),
                             keys_out->untyped_data(), values_out->untyped_data(), positions.typed_data(),
                             start.typed_data(), rotates ? cos.typed_data() : nullptr,
                             rotates ? sin.typed_data() : nullptr, *type, queries.dimensions()[0],
                             queries.dimensions()[1], queries.dimensions()[2], new_keys.dimensions()[2],
                             queries.dimensions()[3], keys.dimensions()[2], scale, softcap, window};
  const int64_t rows = step.rows, tokens = step.tokens, groups = step.groups, size = step.size, slots = step.slots, pairs = rows * groups;
  if (size % 16 != 0 || size == 0 || size > any4::kMostChannels) {
    return Invalid("need heads of a multiple of 16 channels up to 256");
  }
  if (groups == 0 || step.heads % groups != 0 || slots == 0 || window < 0) {
    return Invalid("its shapes are empty, or no multiples of one another");
  }
  if (!Has(new_keys, {rows, tokens, groups, size}) || !Has(new_values, {rows, tokens, groups, size}) ||
      !Has(keys, {pairs, size, slots}) ||      !Has(values, {pairs, slots, size}) || !Has(*keys_out, {pairs, size, slots}) ||
      !Has(*values_out, {pairs, slots, size}) || length.element_count() != 1 || length_out->element_count() != 1 ||
      !Has(positions, {rows, tokens}) || !Has(start, {rows}) || !Has(*mixed, {rows, tokens, step.heads, size}) ||
      (rotates && (!Has(cos, {rows, tokens, size / 2}) || !Has(sin, {rows, tokens, size / 2})))) {
    return Invalid("the shapes of its operands don't fit together");
  }
  if (std::any_of(step.start, step.start + rows, [](int32_t first) { return first < 0; })) {
    return Invalid("a row starts before the first slot");
  }
  const auto& kernel = any4::KernelFor(*isa, any4::PortableDense(), any4::Avx2Dense(), any4::Avx512Dense());
  any4::Executor executor = any4::ExecutorOf(pool);
  int64_t seen = 0;
  for (int64_t token = 0; token < rows * tokens; ++token) {
    seen += std::max<int64_t>(step.own(token) + 1 - step.first(token), 0);
  }
  if (2 * seen * step.heads * size < kWakingWork) executor.threads = 1;
  any4::ParallelFor(executor, pairs, [&](int64_t pair) { kernel.append(step, pair); });
  AttendInBlocks(executor, step, kernel, {mixed->untyped_data(), size, *type});
  *length_out->typed_data() = *length.typed_data() + static_cast<int32_t>(tokens);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(any4_cpu_attention, Step,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Arg<Any>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Integers>()
                                  .Arg<Floats>()
                                  .Arg<Floats>()
                                  .Ret<Any>()
                                  .Ret<Any>()
                                  .Ret<Any>()
                                  .Ret<Integers>()
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("window")
                                  .Attr<std::string_view>("isa"));
