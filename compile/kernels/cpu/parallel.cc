// The helpers behind parallel.h.
#include "parallel.h"

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>
#include <vector>

namespace tpserve {
namespace {

// Longer than the pause between two kernels of a step, so helpers sleep between steps only.
constexpr auto kSpin = std::chrono::microseconds(50);

inline void pause_core() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// One job at a time. `ticket_` is the job's number (high half) and its next task (low half): a task is taken by adding
/// one, which fails if the job has changed meanwhile, so a helper that was away cannot take a task of another job with
/// this one's function.
class Pool {
 public:
  void run(int64_t num_tasks, int threads, TaskFunction task, const void* context) {
    // A second caller at the same time does its own work: two ranks in one process are a test's business.
    std::unique_lock<std::mutex> lock(busy_, std::try_to_lock);
    if (!lock.owns_lock() || threads <= 1 || num_tasks >= kClosed) {
      for (int64_t i = 0; i < num_tasks; ++i) task(context, i);
      return;
    }
    start_helpers(threads - 1);
    const uint64_t job = (ticket_.load(std::memory_order_relaxed) >> 32) + 1;
    // Closed while its fields change: whoever still looks at the last job finds no task.
    ticket_.store(job << 32 | kClosed, std::memory_order_seq_cst);
    std::atomic_thread_fence(std::memory_order_seq_cst);
    task_.store(task, std::memory_order_relaxed);
    context_.store(context, std::memory_order_relaxed);
    num_tasks_.store(num_tasks, std::memory_order_relaxed);
    helpers_wanted_.store(threads - 1, std::memory_order_relaxed);
    unfinished_.store(num_tasks, std::memory_order_relaxed);
    ticket_.store(job << 32, std::memory_order_seq_cst);
    wake_sleepers();
    take_tasks();
    // Only tasks that a helper has begun are left. If it is off its core, it may need this one.
    for (int spins = 0; unfinished_.load(std::memory_order_acquire) != 0; ++spins) {
      if (spins < 2000) {
        pause_core();
      } else {
        sched_yield();
      }
    }
  }

  std::atomic<int> max_threads{static_cast<int>(std::thread::hardware_concurrency())};

 private:
  static constexpr uint64_t kClosed = 0xffffffff;

  void start_helpers(int count) {
    while (static_cast<int>(num_helpers_) < count) {
      // Never joined: helpers live as long as the process, and the library is linked not to be unloaded.
      std::thread([this, index = num_helpers_] { help(index); }).detach();
      ++num_helpers_;
    }
  }

  /// Takes tasks of the present job until there are none.
  void take_tasks() {
    uint64_t ticket = ticket_.load(std::memory_order_acquire);
    for (;;) {
      const auto next = static_cast<int64_t>(ticket & kClosed);
      const TaskFunction task = task_.load(std::memory_order_relaxed);
      const void* context = context_.load(std::memory_order_relaxed);
      if (next >= num_tasks_.load(std::memory_order_relaxed)) return;
      // Pairs with the fence in `run`: if a field was the next job's, the exchange sees that job's ticket and fails.
      std::atomic_thread_fence(std::memory_order_acquire);
      if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel, std::memory_order_acquire)) {
        continue;
      }
      task(context, next);
      unfinished_.fetch_sub(1, std::memory_order_acq_rel);
      ticket = ticket_.load(std::memory_order_acquire);
    }
  }

  void help(int index) {
    uint64_t seen = 0;
    for (;;) {
      const uint64_t job = await_job(seen);
      seen = job;
      if (index < helpers_wanted_.load(std::memory_order_relaxed)) take_tasks();
    }
  }

  /// Waits for a job other than `seen`, spinning first.
  uint64_t await_job(uint64_t seen) {
    for (;;) {
      const auto deadline = std::chrono::steady_clock::now() + kSpin;
      for (int spins = 1;; ++spins) {
        const uint64_t ticket = ticket_.load(std::memory_order_acquire);
        if (ticket >> 32 != seen && (ticket & kClosed) != kClosed) return ticket >> 32;
        pause_core();
        if (spins % 64 == 0 && std::chrono::steady_clock::now() > deadline) break;
      }
      const uint32_t bell = bell_.load(std::memory_order_seq_cst);
      num_sleepers_.fetch_add(1, std::memory_order_seq_cst);
      // Looked at again after being counted: a job that was opened before would not have rung the bell.
      if (ticket_.load(std::memory_order_seq_cst) >> 32 == seen) {
        syscall(SYS_futex, reinterpret_cast<uint32_t*>(&bell_), FUTEX_WAIT_PRIVATE, bell, nullptr, nullptr, 0);
      }
      num_sleepers_.fetch_sub(1, std::memory_order_seq_cst);
    }
  }

  void wake_sleepers() {
    if (num_sleepers_.load(std::memory_order_seq_cst) == 0) return;
    bell_.fetch_add(1, std::memory_order_seq_cst);
    syscall(SYS_futex, reinterpret_cast<uint32_t*>(&bell_), FUTEX_WAKE_PRIVATE, INT32_MAX, nullptr, nullptr, 0);
  }

  std::mutex busy_;
  int num_helpers_ = 0;
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<int64_t> unfinished_{0};
  alignas(64) std::atomic<TaskFunction> task_{nullptr};
  std::atomic<const void*> context_{nullptr};
  std::atomic<int64_t> num_tasks_{0};
  std::atomic<int> helpers_wanted_{0};
  alignas(64) std::atomic<uint32_t> bell_{0};
  std::atomic<int> num_sleepers_{0};
};

Pool& pool() {
  static Pool* const instance = new Pool;  // helpers outlive static destruction
  return *instance;
}

}  // namespace

void run_tasks(int64_t num_tasks, int threads, TaskFunction task, const void* context) {
  pool().run(num_tasks, threads, task, context);
}

int max_threads() { return pool().max_threads.load(std::memory_order_relaxed); }

void set_max_threads(int count) { pool().max_threads.store(count, std::memory_order_relaxed); }

}  // namespace tpserve
