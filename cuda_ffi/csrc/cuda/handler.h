// What the handlers share: the shape of an operand, how they refuse a call, and a launch in device memory of XLA's.
#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <optional>
#include <string>
#include <string_view>

#include "slots.h"
#include "xla/ffi/api/ffi.h"

namespace any4 {

template <class Buffer>
bool HasShape(const Buffer& buffer, std::initializer_list<int64_t> shape) {
  const auto dims = buffer.dimensions();
  return dims.size() == shape.size() && std::equal(dims.begin(), dims.end(), shape.begin());
}

// `target` is the handler's name.
inline xla::ffi::Error Invalid(std::string_view target, std::string_view what) {
  return xla::ffi::Error::InvalidArgument(std::string(target) + ": " + std::string(what));
}

// What a handler returns after a launch.
inline xla::ffi::Error Done(std::string_view target, cudaError_t error) {
  if (error == cudaSuccess) return xla::ffi::Error::Success();
  return xla::ffi::Error::Internal(std::string(target) + ": the launch failed: " + cudaGetErrorString(error));
}

// launch(memory) -> cudaError_t, with memory for all slots.
template <class Launch>
xla::ffi::Error LaunchInSlots(std::string_view target, xla::ffi::ScratchAllocator& scratch, const Slots& slots,
                              const Launch& launch) {
  const std::optional<void*> memory = scratch.Allocate(slots.count * slots.bytes);
  if (memory) return Done(target, launch(*memory));
  return xla::ffi::Error(xla::ffi::ErrorCode::kResourceExhausted,
                         std::string(target) + ": got none of the " + std::to_string(slots.count * slots.bytes) +
                             " bytes of device memory that it works in; free some");
}

}  // namespace any4
