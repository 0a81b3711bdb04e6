// For the drivers of the C++ kernels: threads in place of XLA's pool, and the instruction sets of this processor.
#pragma once

#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "isa.h"
#include "threads.h"

// A new thread for each function that an executor runs, which a driver can afford.
class Pool {
 public:
  any4::Executor executor(int64_t threads) {
    return {threads, [this](std::function<void()> task) {
              const std::lock_guard<std::mutex> lock(mutex_);
              running_.emplace_back(std::move(task));
            }};
  }
  ~Pool() {
    for (std::thread& thread : running_) thread.join();
  }

 private:
  std::mutex mutex_;
  std::vector<std::thread> running_;
};

inline std::vector<any4::Isa> InstructionSets() {
  std::vector<any4::Isa> found;
  for (const char* name : {"portable", "avx2", "avxvnni", "avx512", "avx512vnni", "avx512vbmi", "dotprod"}) {
    if (const auto isa = any4::IsaNamed(name)) found.push_back(*isa);
  }
  return found;
}
