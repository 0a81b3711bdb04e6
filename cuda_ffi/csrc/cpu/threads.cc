#include "threads.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace any4 {
namespace {

std::atomic<int64_t> thread_limit{0};

// XLA flushes subnormals on the thread that calls a handler, not on every thread of its pool; results must not depend
// on which thread a task fell to.
#if defined(__x86_64__)
unsigned FloatMode() { return _mm_getcsr(); }
void SetFloatMode(unsigned mode) { _mm_setcsr(mode); }
void Pause() { _mm_pause(); }
#else
unsigned FloatMode() { return 0; }
void SetFloatMode(unsigned) {}
void Pause() {}
#endif

struct Work {
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> finished{0};
  int64_t count = 0;
  unsigned float_mode = 0;
  // The caller's, alive until `finished` is `count`.
  const std::function<void(int64_t)>* task = nullptr;

  void Run() {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      (*task)(i);
      finished.fetch_add(1, std::memory_order_release);
    }
  }
};

}  // namespace

void ParallelFor(const Executor& executor, int64_t count, const std::function<void(int64_t)>& task) {
  const int64_t limit = thread_limit.load(std::memory_order_relaxed);
  const int64_t threads = std::min({limit > 0 ? limit : executor.threads, executor.threads, count});
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  // Shared: a helper may start after everything is done, and then finds nothing to claim.
  auto work = std::make_shared<Work>();
  work->count = count;
  work->task = &task;
  work->float_mode = FloatMode();
  for (int64_t i = 1; i < threads; ++i) {
    executor.spawn([work] {
      const unsigned own_mode = FloatMode();
      SetFloatMode(work->float_mode);
      work->Run();
      SetFloatMode(own_mode);
    });
  }
  work->Run();
  // A task takes some 10 us; only where the system took a helper off its core is it worth giving up this one.
  for (int spins = 0; work->finished.load(std::memory_order_acquire) < count; ++spins) {
    if (spins < 20000) {
      Pause();
    } else {
      std::this_thread::yield();
    }
  }
}

void LimitThreads(int64_t limit) { thread_limit.store(limit, std::memory_order_relaxed); }

}  // namespace any4
