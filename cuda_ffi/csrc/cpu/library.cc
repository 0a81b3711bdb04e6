// What Python asks the library before it uses it; plain C, called through ctypes.
#include <string_view>

#include "isa.h"
#include "threads.h"
#include "xla/ffi/api/c_api.h"

extern "C" {

// Version of XLA's FFI that the handlers were compiled for, major * 1000 + minor.
int any4_ffi_abi() { return XLA_FFI_API_MAJOR * 1000 + XLA_FFI_API_MINOR; }

// 1 where this processor runs the code of the instruction set of that name.
int any4_cpu_has_isa(const char* name) { return any4::IsaNamed(std::string_view(name)).has_value(); }

// At most this many threads work in a call from now on; 0 takes the limit away.
void any4_cpu_limit_threads(int limit) { any4::LimitThreads(limit); }
}
