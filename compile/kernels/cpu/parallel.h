// Tasks of one kernel shared among threads, without waiting for a thread that has no task.
//
// A serving host is shared: coordinator, gateway and clients run on the same cores, so at any moment a helper may be off
// its core for milliseconds. A team that splits work ahead and meets at a barrier (OpenMP) then waits for it in every
// kernel: 290 ms a step instead of 12 were seen. Here threads take small tasks one by one from a counter; the caller
// takes all that the helpers do not, and waits only for tasks already begun.
#pragma once

#include <cstdint>
#include <type_traits>

namespace tpserve {

using TaskFunction = void (*)(const void* context, int64_t task);

/// Runs task(context, i) for all i in [0, num_tasks), on the caller and at most `threads` - 1 helpers. Which thread runs
/// a task is not defined; tasks must not throw.
void run_tasks(int64_t num_tasks, int threads, TaskFunction task, const void* context);

/// Threads that kernels may use, the caller included.
int max_threads();

/// Sets it for the whole process.
void set_max_threads(int count);

/// Threads for a kernel of `work` scalar operations over `tasks` tasks: handing over tasks costs about a microsecond.
inline int num_threads(int64_t work, int64_t tasks) {
  if (work < 50'000 || tasks < 2) return 1;
  const int64_t available = max_threads();
  return static_cast<int>(available < tasks ? available : tasks);
}

/// Runs body(begin, end) over pieces of [0, count), at most `piece` long, on `threads` threads.
template <typename Body>
void parallel_pieces(int64_t count, int64_t piece, int threads, const Body& body) {
  if (count <= 0) return;
  if (threads <= 1) {
    body(int64_t{0}, count);
    return;
  }
  struct Context {
    const Body& body;
    int64_t count, piece;
  };
  const Context context{body, count, piece};
  run_tasks(
      (count + piece - 1) / piece, threads,
      [](const void* pointer, int64_t task) {
        const auto& c = *static_cast<const Context*>(pointer);
        const int64_t begin = task * c.piece, end = begin + c.piece;
        c.body(begin, end < c.count ? end : c.count);
      },
      &context);
}

/// Runs body(i) for i in [0, count) on `threads` threads, in pieces that leave each thread about four.
template <typename Body>
void parallel_for(int64_t count, int threads, const Body& body) {
  const int64_t pieces = int64_t{4} * threads;
  parallel_pieces(count, (count + pieces - 1) / pieces, threads, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

}  // namespace tpserve
