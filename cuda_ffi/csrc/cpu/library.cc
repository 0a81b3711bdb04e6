// What Python asks or tells the library directly: plain C, called through ctypes.
#include <string_view>

#include "isa.h"
#include "threads.h"
#include "xla/ffi/api/c_api.h"

extern "C" {

// The version of XLA's FFI that the handlers were compiled for: major * 1000 + minor.
int any4_ffi_abi() { return XLA_FFI_API_MAJOR * 1000 + XLA_FFI_API_MINOR; }

// 1 if this processor has the instruction set of that name, else 0.
int any4_cpu_has_isa(const char* name) { return any4::IsaNamed(std::string_view(name)).has_value(); }

// Limits each call to this many threads from now on; 0 removes the limit.
void any4_cpu_limit_threads(int limit) { any4::LimitThreads(limit); }
}
