// Work split over threads that somebody else owns: XLA's own pool in a handler, std::thread in a test driver.
#pragma once

#include <cstdint>
#include <functional>

namespace any4 {

struct Executor {
  // Threads that run at a time, the caller's among them.
  int64_t threads = 1;
  // Runs a function on another thread, some time.
  std::function<void(std::function<void()>)> spawn;
};

// Calls task(i) once for each i below `count`, on the caller and at most executor.threads - 1 others, and returns when
// all have returned. Only tasks that were begun are waited for, so it can't deadlock where the pool's threads are all
// callers of this function.
void ParallelFor(const Executor& executor, int64_t count, const std::function<void(int64_t)>& task);

// At most this many threads from now on, whatever the executor has; 0 takes the limit away.
void LimitThreads(int64_t limit);

}  // namespace any4
