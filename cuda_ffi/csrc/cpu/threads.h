// Tasks shared among threads that somebody else owns: XLA's own pool in a handler, std::thread in a test driver.
#pragma once

#include <cstdint>
#include <functional>

namespace any4 {

struct Executor {
  // How many threads run at a time, the caller's included.
  int64_t threads = 1;
  // Runs a function on another thread, now or later.
  std::function<void(std::function<void()>)> spawn;
};

// Calls task(i) once for each i below `count`, on the caller's thread and at most executor.threads - 1 others, and
// returns when all calls have returned. It waits only for tasks that have begun, so it can't deadlock when all of the
// pool's threads call it.
void ParallelFor(const Executor& executor, int64_t count, const std::function<void(int64_t)>& task);

// Limits every ParallelFor to this many threads from now on, whatever the executor has; 0 removes the limit.
void LimitThreads(int64_t limit);

}  // namespace any4
