// For the drivers that run under compute-sanitizer: device memory that ends where its arrays end.
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <vector>

inline void Need(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::printf("%s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

template <typename T>
class Device {
 public:
  // Every byte is 0xFF, which is NaN in floats.
  explicit Device(size_t count) : count_(count) {
    Need(cudaMalloc(&data_, Bytes()), "no memory");
    Need(cudaMemset(data_, 0xFF, Bytes()), "memset");
  }
  explicit Device(const std::vector<T>& values) : Device(values.size()) {
    Need(cudaMemcpy(data_, values.data(), count_ * sizeof(T), cudaMemcpyHostToDevice), "copy");
  }
  Device(const Device&) = delete;
  ~Device() { cudaFree(data_); }

  T* get() const { return static_cast<T*>(data_); }
  std::vector<T> Download() const {
    std::vector<T> values(count_);
    Need(cudaDeviceSynchronize(), "the kernel");
    Need(cudaMemcpy(values.data(), data_, count_ * sizeof(T), cudaMemcpyDeviceToHost), "copy");
    return values;
  }

 private:
  size_t Bytes() const { return count_ == 0 ? 1 : count_ * sizeof(T); }

  void* data_ = nullptr;
  size_t count_;
};
