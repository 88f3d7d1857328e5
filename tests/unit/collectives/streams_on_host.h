// Kernels of several GPUs on one thread of the host: every CUDA thread is a context of its own, switched at random.
//
// A stream launches its kernels one after the other, as programmatic launch allows: a kernel may start when all blocks of
// the one before have called `pdl_launch` or ended, its blocks in any order and at any time; `pdl_wait` returns when the
// one before has ended. A store is seen word by word at any later time: one to the own memory before its kernel has ended,
// one to a peer's perhaps after it. A word of data to a place that is its own flag must find it empty.
//
// Not modelled: plain stores and atomic additions, which are seen at once, warps, and clusters.
#pragma once

#include <bit>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

// The names that kernels use, here by other rules than in the tests of single blocks.
#define __syncthreads threads_of_host_sync
#define __syncwarp warp_of_host_sync
#define __stcg store_of_host
#define atomicAdd add_of_host
#define pdl_launch launch_of_host
#define pdl_wait wait_of_host
#define load_l2 load_of_host
#define barrier_init barrier_init_of_host
template <int kThreads>
void meet_at(int) {}  // tiles are sent by single threads here
#define barrier_arrive barrier_arrive_of_host
#define barrier_wait barrier_wait_of_host
#include "cuda_on_host.h"
#undef __syncthreads
#undef __syncwarp
#undef __stcg
#undef atomicAdd
#undef pdl_launch
#undef pdl_wait
#undef load_l2
#undef barrier_init
#undef barrier_arrive
#undef barrier_wait

inline thread_local dim3 blockDim;
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

namespace streams {

struct Kernel;
struct World;
inline World* world_of_fibers;

struct Block {
  Kernel* kernel;
  int index, running = 0, arrived = 0, phase = 0;
  bool started = false, triggered = false;
};

struct Fiber {
  Context context;
  Block* block;
  int thread;
  bool ended = false;
};

struct Kernel {
  int rank, number;  // in its stream
  int call;
  int num_blocks, num_threads;
  std::function<void()> body;
  std::vector<Block> blocks;
  int ended_blocks = 0, triggered_or_ended = 0;
  bool ended = false;
};

struct Word {
  uint32_t* target;
  uint32_t value;
  Kernel* kernel;
  bool to_peer, is_flag;  // to a place that must be free
};

/// Everything that runs; one at a time.
struct World {
  std::mt19937 random;
  std::vector<std::vector<std::unique_ptr<Kernel>>> streams;
  std::vector<size_t> next;  // kernel of each stream that was not launched
  std::vector<std::unique_ptr<Fiber>> fibers, spare;
  std::vector<Block*> waiting_blocks;
  std::vector<Word> words;
  std::vector<std::vector<uint8_t>> memories;  // of each rank, that all map
  Fiber* current = nullptr;
  std::string wrong;
  int steps = 0;  // since a kernel ended
  int eager = 0;  // a rank whose threads run more often than the others', for a while

  uint32_t below(uint32_t n) { return random() % n; }

  void fail(const std::string& what) {
    if (wrong.empty()) wrong = what;
  }
  void queue(int rank, int call, int num_blocks, int num_threads, std::function<void()> body) {
    auto kernel = std::make_unique<Kernel>();
    kernel->rank = rank, kernel->number = static_cast<int>(streams[rank].size()), kernel->call = call;
    kernel->num_blocks = num_blocks, kernel->num_threads = num_threads, kernel->body = std::move(body);
    streams[rank].push_back(std::move(kernel));
  }
  void yield() { current->context.pause(); }
  void perhaps_yield() {
    if (below(3) == 0) yield();
  }

  void deliver(size_t i) {
    const Word word = words[i];
    words[i] = words.back();
    words.pop_back();
    if (word.is_flag && word.value != ~0u && *word.target != ~0u) {
      fail("call " + std::to_string(word.kernel->call) + " of rank " + std::to_string(word.kernel->rank) +
           " wrote to a place that was not free");
    }
    *word.target = word.value;
  }
  void store(void* target, const void* value, int words_of_value, bool to_peer, bool is_flag = true) {
    for (int i = 0; i < words_of_value; ++i) {
      const uint32_t word = static_cast<const uint32_t*>(value)[i];
      words.push_back({static_cast<uint32_t*>(target) + i, word, current->block->kernel, to_peer, is_flag});
    }
    perhaps_yield();
  }

  void end_thread(Block& block) {
    if (--block.running > 0) return;
    Kernel& kernel = *block.kernel;
    kernel.triggered_or_ended += !block.triggered;
    if (++kernel.ended_blocks < kernel.num_blocks) return;
    for (size_t i = words.size(); i-- > 0;) {
      if (words[i].kernel == &kernel && !words[i].to_peer) deliver(i);
    }
    kernel.ended = true;
    steps = 0;
  }

  static void enter() {
    World& w = *world_of_fibers;
    w.current->block->kernel->body();
    w.current->ended = true;
    w.yield();
  }

  void start(Block& block) {
    block.started = true;
    block.running = block.kernel->num_threads;
    for (int t = 0; t < block.kernel->num_threads; ++t) {
      if (spare.empty()) spare.push_back(std::make_unique<Fiber>());
      auto fiber = std::move(spare.back());
      spare.pop_back();
      fiber->block = &block, fiber->thread = t, fiber->ended = false;
      fiber->context.prepare(1 << 15, enter);
      fibers.push_back(std::move(fiber));
    }
  }

  void launch_next() {
    for (size_t rank = 0; rank < streams.size(); ++rank) {
      if (next[rank] == streams[rank].size()) continue;
      if (next[rank] > 0) {
        const Kernel& before = *streams[rank][next[rank] - 1];
        if (before.triggered_or_ended < before.num_blocks) continue;
      }
      Kernel& kernel = *streams[rank][next[rank]++];
      kernel.blocks.resize(kernel.num_blocks);
      for (int i = 0; i < kernel.num_blocks; ++i) {
        kernel.blocks[i] = {&kernel, i};
        waiting_blocks.push_back(&kernel.blocks[i]);
      }
    }
  }

  void run_some(size_t i) {
    Fiber& fiber = *fibers[i];
    current = &fiber;
    const Kernel& kernel = *fiber.block->kernel;
    threadIdx = dim3(fiber.thread), blockIdx = dim3(fiber.block->index);
    gridDim = dim3(kernel.num_blocks), blockDim = dim3(kernel.num_threads);
    fiber.context.resume();
    if (!fiber.ended) return;
    end_thread(*fiber.block);
    spare.push_back(std::move(fibers[i]));
    fibers[i] = std::move(fibers.back());
    fibers.pop_back();
  }

  /// Until all has ended, or none for a long time.
  void run() {
    launch_next();
    while (wrong.empty() && !(fibers.empty() && waiting_blocks.empty())) {
      if (++steps > 500'000) return fail("kernels that do not end");
      if (below(4096) == 0) eager = static_cast<int>(below(static_cast<uint32_t>(streams.size())));
      const uint32_t dice = below(16);
      if (dice < 2 && !words.empty()) {
        for (int n = 0; n < 8 && !words.empty(); ++n) deliver(below(static_cast<uint32_t>(words.size())));
      } else if (!waiting_blocks.empty() && (fibers.empty() || dice < 4)) {
        const size_t i = below(static_cast<uint32_t>(waiting_blocks.size()));
        Block* block = waiting_blocks[i];
        waiting_blocks[i] = waiting_blocks.back();
        waiting_blocks.pop_back();
        start(*block);
      } else if (!fibers.empty()) {
        size_t i = below(static_cast<uint32_t>(fibers.size()));
        if (fibers[i]->block->kernel->rank != eager) i = below(static_cast<uint32_t>(fibers.size()));
        run_some(i);
        if (dice < 8) launch_next();
      } else if (!words.empty()) {
        deliver(below(static_cast<uint32_t>(words.size())));
      }
      if (fibers.empty() && waiting_blocks.empty()) launch_next();
    }
  }
};

}  // namespace streams

inline void __syncthreads() {
  streams::World& world = *streams::world_of_fibers;
  streams::Block& block = *world.current->block;
  const int phase = block.phase;
  if (++block.arrived == block.kernel->num_threads) {
    block.arrived = 0, ++block.phase;
    return;
  }
  while (block.phase == phase) world.yield();
}
inline void __syncwarp() {}  // nothing here relies on warps
inline void __nanosleep(unsigned) { streams::world_of_fibers->yield(); }
inline unsigned atomicAdd(unsigned* p, unsigned value) {
  streams::world_of_fibers->perhaps_yield();
  const unsigned before = *p;
  *p += value;
  return before;
}
inline unsigned atomicCAS(unsigned* p, unsigned from, unsigned to) {
  const unsigned before = *p;
  if (before == from) *p = to;
  return before;
}
template <typename T>
void __stcg(T* target, T value) {
  streams::world_of_fibers->store(target, &value, sizeof(T) / 4, false);
}
inline uint32_t __float_as_uint(float f) { return std::bit_cast<uint32_t>(f); }
inline float __uint_as_float(uint32_t w) { return std::bit_cast<float>(w); }

namespace tpserve::cuda {

inline void pdl_launch() {
  streams::World& world = *streams::world_of_fibers;
  streams::Block& block = *world.current->block;
  if (!block.triggered) block.triggered = true, ++block.kernel->triggered_or_ended;
  world.perhaps_yield();
}
inline void pdl_wait() {
  streams::World& world = *streams::world_of_fibers;
  const streams::Kernel& kernel = *world.current->block->kernel;
  if (kernel.number == 0) return;
  while (!world.streams[kernel.rank][kernel.number - 1]->ended) world.yield();
}
inline uint4 load_l2(const void* p) {
  streams::world_of_fibers->perhaps_yield();
  return *static_cast<const uint4*>(p);
}
template <typename T>
void store_peer(T* p, T v) {
  streams::World& world = *streams::world_of_fibers;
  const auto& own = world.memories[world.current->block->kernel->rank];
  const auto* at = reinterpret_cast<const uint8_t*>(p);
  world.store(p, &v, sizeof(T) / 4, at < own.data() || at >= own.data() + own.size());
}
template <typename T>
T load_peer(const T* p) {
  streams::world_of_fibers->yield();
  return *p;
}
inline void barrier_init(uint64_t* barrier, int) { *barrier = 0; }
inline void barrier_arrive(uint64_t* barrier) { *barrier = 1; }
inline void barrier_wait(uint64_t* barrier, uint32_t) {
  while (*barrier == 0) streams::world_of_fibers->yield();
}

}  // namespace tpserve::cuda
