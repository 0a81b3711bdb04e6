#include "threads.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace any4 {
namespace {

std::atomic<int64_t> thread_limit{0};

// XLA flushes subnormals on the thread that calls a handler, but not on every thread of its pool. Helpers copy the
// caller's mode, since results must not depend on which thread runs a task.
#if defined(__x86_64__)
unsigned FloatMode() { return _mm_getcsr(); }
void SetFloatMode(unsigned mode) { _mm_setcsr(mode); }
void Pause() { _mm_pause(); }
#else
unsigned FloatMode() { return 0; }
void SetFloatMode(unsigned) {}
void Pause() {}
#endif

// What a ParallelFor shares with its helpers. Each thread has a range of consecutive tasks, which tend to read memory in
// order, and takes over from the others' when its own is done. A helper that comes too late finds no task left to claim.
struct Work {
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t end;
  };

  Work(int64_t count, int64_t threads, const std::function<void(int64_t)>& task)
      : count(count), float_mode(FloatMode()), task(&task), ranges(threads) {
    for (int64_t i = 0; i < threads; ++i) {
      ranges[i].next.store(count * i / threads, std::memory_order_relaxed);
      ranges[i].end = count * (i + 1) / threads;
    }
  }

  const int64_t count;
  const unsigned float_mode;
  // The caller owns it and keeps it alive until `finished` is `count`.
  const std::function<void(int64_t)>* const task;
  std::vector<Range> ranges;
  std::atomic<int64_t> joined{0};
  alignas(64) std::atomic<int64_t> finished{0};

  void Run() {
    const int64_t threads = static_cast<int64_t>(ranges.size()), own = joined.fetch_add(1, std::memory_order_relaxed);
    int64_t done = 0;
    for (int64_t other = 0; other < threads; ++other) {
      Range& range = ranges[(own + other) % threads];
      for (int64_t i; (i = range.next.fetch_add(1, std::memory_order_relaxed)) < range.end; ++done) (*task)(i);
    }
    finished.fetch_add(done, std::memory_order_release);
  }
};

// How long a helper stays awake after its work: in a decoding loop the next product follows within some 20 us, and
// waking a thread takes longer than half of a small product. After that it leaves XLA's thread to others.
constexpr std::chrono::microseconds kLinger(50);

// Where lingering helpers look for more work.
struct Mailbox {
  std::mutex mutex;
  std::shared_ptr<Work> latest;     // guarded by mutex
  int64_t waiting = 0;              // helpers that will see the next work; guarded by mutex
  std::atomic<uint64_t> posted{0};  // how many works were posted so far

  // Returns how many helpers will take the work.
  int64_t Post(const std::shared_ptr<Work>& work) {
    const std::lock_guard<std::mutex> lock(mutex);
    latest = work;
    posted.store(posted.load(std::memory_order_relaxed) + 1, std::memory_order_release);
    return std::exchange(waiting, 0);
  }

  // The next work to be posted, or null if none comes in time.
  std::shared_ptr<Work> Await() {
    uint64_t seen;
    {
      const std::lock_guard<std::mutex> lock(mutex);
      seen = posted.load(std::memory_order_relaxed);
      ++waiting;
    }
    const auto until = std::chrono::steady_clock::now() + kLinger;
    while (posted.load(std::memory_order_acquire) == seen && std::chrono::steady_clock::now() < until) Pause();
    const std::lock_guard<std::mutex> lock(mutex);
    if (posted.load(std::memory_order_relaxed) != seen) return latest;
    --waiting;
    return nullptr;
  }
};

// Never destroyed, since helpers may outlive main.
Mailbox& TheMailbox() {
  static auto& mailbox = *new Mailbox;
  return mailbox;
}

void Help(std::shared_ptr<Work> work) {
  const unsigned own_mode = FloatMode();
  for (; work != nullptr; work = TheMailbox().Await()) {
    SetFloatMode(work->float_mode);
    work->Run();
  }
  SetFloatMode(own_mode);
}

}  // namespace

void ParallelFor(const Executor& executor, int64_t count, const std::function<void(int64_t)>& task) {
  const int64_t limit = thread_limit.load(std::memory_order_relaxed);
  const int64_t threads = std::min({limit > 0 ? limit : executor.threads, executor.threads, count});
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  const auto work = std::make_shared<Work>(count, threads, task);
  for (int64_t i = TheMailbox().Post(work) + 1; i < threads; ++i) {
    executor.spawn([work] { Help(work); });
  }
  work->Run();
  // A task takes some 10 us. Yielding this core pays only if the system has taken a helper off its own.
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
