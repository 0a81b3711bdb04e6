#include "device.h"

#include <cuda_runtime_api.h>

namespace any4 {
namespace {

int Attribute(cudaDeviceAttr attribute, int otherwise) {
  int device = 0, value = otherwise;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, attribute, device);
  return value;
}

}  // namespace

int Multiprocessors() { return Attribute(cudaDevAttrMultiProcessorCount, 1); }

bool IsHopper() {
  return Attribute(cudaDevAttrComputeCapabilityMajor, 0) == 9 && Attribute(cudaDevAttrComputeCapabilityMinor, -1) == 0;
}

}  // namespace any4
