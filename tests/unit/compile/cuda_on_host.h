// What kernels take of CUDA, run on the host: a block's threads are contexts that one thread of the host runs in turn, each
// until it meets others, at shuffles for example. Stands in for common.cuh and hopper.cuh in tests. Barriers in shared
// memory, bulk copies and the proxies' order are modelled: what a thread stores with `__stcg` is seen by bulk copies only
// after that thread's `async_proxy_fence`, and what kernels before this one write (`unfinished`) only after its `pdl_wait`.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <atomic>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <iostream>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __grid_constant__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(n)

struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct __half2 { uint32_t bits; };
__half2 __floats2half2_rn(float, float);  // of products, which do not run here
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
struct dim3 { unsigned x = 1, y = 1, z = 1; dim3(unsigned x = 1, unsigned y = 1) : x(x), y(y) {} };
using cudaStream_t = void*;
inline void __threadfence() {}
inline void __threadfence_system() {}

inline thread_local dim3 threadIdx, blockIdx, gridDim;

// --- Contexts -------------------------------------------------------------------------------------------------------

/// Something that runs on a stack of its own, in turns with what resumes it. `swapcontext` would ask the system for the
/// mask of signals in every turn, which takes longer than most turns: it only enters here.
struct Context {
  ucontext_t entry;
  jmp_buf rest, resumed_by;
  std::unique_ptr<char[]> stack;
  bool has_begun = false;

  void prepare(size_t stack_bytes, void (*body)()) {
    if (!stack) stack.reset(new char[stack_bytes]);
    getcontext(&entry);
    entry.uc_stack.ss_sp = stack.get(), entry.uc_stack.ss_size = stack_bytes;
    entry.uc_link = nullptr;
    makecontext(&entry, body, 0);
    has_begun = false;
  }
  /// Returns when it pauses.
  void resume() {
    if (_setjmp(resumed_by) != 0) return;
    if (has_begun) _longjmp(rest, 1);
    has_begun = true;
    setcontext(&entry);
  }
  /// From within; returns when it is resumed.
  void pause() {
    if (_setjmp(rest) == 0) _longjmp(resumed_by, 1);
  }
};

// --- Warps ----------------------------------------------------------------------------------------------------------

/// Where a number of threads wait for one another.
struct Meeting {
  int arrived = 0, phase = 0;
};
struct Warp {
  Meeting all;
  uint64_t values[32];
};
struct PendingStore {
  void* target;
  char bytes[16];
  int size;
};
struct Thread {
  Context context;
  Warp* warp;
  std::vector<PendingStore> stores;  // while another runs
  bool waited = false, ended = false;
};
struct Block {
  const std::function<void()>* body;
  std::vector<Thread> threads;
  Thread* running;
  Meeting all;
};
inline thread_local Block* block_of_thread;  // of the host; none: it runs no kernel

inline void let_others_run() { block_of_thread->running->context.pause(); }
inline void meet(Meeting& meeting, int count) {
  const int phase = meeting.phase;
  if (++meeting.arrived == count) {
    meeting.arrived = 0, ++meeting.phase;
    return;
  }
  while (meeting.phase == phase) let_others_run();
}
inline Warp& own_warp() { return *block_of_thread->running->warp; }
inline void __syncwarp() { meet(own_warp().all, 32); }
inline void __syncthreads() { meet(block_of_thread->all, static_cast<int>(block_of_thread->threads.size())); }

template <typename T>
T exchanged(T value, int from) {
  Warp& warp = own_warp();
  std::memcpy(&warp.values[threadIdx.x % 32], &value, sizeof(T));
  __syncwarp();
  std::memcpy(&value, &warp.values[from], sizeof(T));
  __syncwarp();
  return value;
}
template <typename T>
T __shfl_xor_sync(unsigned, T value, int offset) {
  return exchanged(value, static_cast<int>(threadIdx.x % 32) ^ offset);
}
template <typename T>
T __shfl_sync(unsigned, T value, int lane) { return exchanged(value, lane & 31); }
inline uint32_t __ballot_sync(unsigned, bool value) {
  Warp& warp = own_warp();
  warp.values[threadIdx.x % 32] = value;
  __syncwarp();
  uint32_t mask = 0;
  for (int lane = 0; lane < 32; ++lane) mask |= static_cast<uint32_t>(warp.values[lane]) << lane;
  __syncwarp();
  return mask;
}
inline bool __all_sync(unsigned mask, bool value) { return __ballot_sync(mask, value) == ~0u; }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int atomicAdd(int* p, int value) { return __atomic_fetch_add(p, value, __ATOMIC_SEQ_CST); }

inline std::mutex memory_mutex;
inline thread_local std::vector<PendingStore> pending_stores;

/// Runs a block of `num_threads`, a multiple of 32, whose threads begin with number `first`.
inline void run_block(dim3 grid, dim3 index, int first, int num_threads, const std::function<void()>& body) {
  constexpr size_t kStackBytes = 64 << 10;
  std::vector<Warp> warps(num_threads / 32);
  Block block{&body, std::vector<Thread>(num_threads), nullptr, {}};
  for (int t = 0; t < num_threads; ++t) {
    Thread& thread = block.threads[t];
    thread.warp = &warps[t / 32];
    thread.context.prepare(kStackBytes, +[] {
      (*block_of_thread->body)();
      block_of_thread->running->ended = true;
      let_others_run();
    });
  }
  block_of_thread = &block;
  gridDim = grid, blockIdx = index;
  for (int left = num_threads; left > 0;) {
    for (int t = 0; t < num_threads; ++t) {
      Thread& thread = block.threads[t];
      if (thread.ended) continue;
      block.running = &thread, threadIdx = dim3(first + t);
      pending_stores.swap(thread.stores);
      thread.context.resume();
      pending_stores.swap(thread.stores);
      left -= thread.ended;
    }
  }
  block_of_thread = nullptr;
}

// --- Memory ---------------------------------------------------------------------------------------------------------

template <typename T>
void __stcg(T* target, T value) {
  PendingStore store{target, {}, sizeof(T)};
  std::memcpy(store.bytes, &value, sizeof(T));
  pending_stores.push_back(store);
}
inline void store_pending() {
  const std::lock_guard lock(memory_mutex);
  for (const PendingStore& store : pending_stores) std::memcpy(store.target, store.bytes, store.size);
  pending_stores.clear();
}

/// What kernels before this one write: until a thread has waited for them it finds there what `stale` has.
struct Unfinished {
  const void* begin;
  std::vector<uint8_t> stale;
};
inline std::vector<Unfinished> unfinished;
inline bool has_waited() { return block_of_thread == nullptr || block_of_thread->running->waited; }
inline const void* as_seen(const void* p) {
  if (has_waited()) return p;
  for (const Unfinished& each : unfinished) {
    const size_t offset = static_cast<const uint8_t*>(p) - static_cast<const uint8_t*>(each.begin);
    if (offset < each.stale.size()) return each.stale.data() + offset;
  }
  return p;
}

template <typename T>
T __ldcg(const T* p) { return *static_cast<const T*>(as_seen(p)); }
template <typename T>
T __ldg(const T* p) { return *p; }

namespace tpserve::cuda {

struct bf16 { uint16_t bits; };
struct fp8 { uint8_t bits; };
inline float low_half(uint32_t w) { w <<= 16; float f; std::memcpy(&f, &w, 4); return f; }
inline float high_half(uint32_t w) { return low_half(w >> 16); }
inline void unpack8(uint4 v, float (&f)[8]) {
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  for (int i = 0; i < 8; ++i) f[i] = i % 2 ? high_half(words[i / 2]) : low_half(words[i / 2]);
}
inline uint32_t rounded(float f) {  // to bfloat16, to nearest even
  uint32_t w;
  std::memcpy(&w, &f, 4);
  return std::isnan(f) ? 0x7FFF : (w + 0x7FFF + (w >> 16 & 1)) >> 16;
}
inline uint32_t pack2(float a, float b) { return rounded(a) | rounded(b) << 16; }
inline uint4 pack8(const float (&f)[8]) {
  return {pack2(f[0], f[1]), pack2(f[2], f[3]), pack2(f[4], f[5]), pack2(f[6], f[7])};
}
inline uint4 load_l2(const void* p) { return *static_cast<const uint4*>(as_seen(p)); }
inline float widened(uint32_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const float value = exponent ? std::ldexp(8.0f + mantissa, exponent - 10) : std::ldexp(float(mantissa), -9);
  return code & 0x80 ? -value : value;
}
inline uint32_t to_fp8(float f) {
  if (std::isnan(f)) return 0x7F;
  const float size = std::fabs(f);
  uint32_t best = 0;
  for (uint32_t code = 1; code < 0x7F; ++code) {
    const float off = std::fabs(widened(code) - size), least = std::fabs(widened(best) - size);
    if (off < least || (off == least && code % 2 == 0)) best = code;
  }
  return best | (std::signbit(f) ? 0x80 : 0);
}
inline uint32_t pack4_fp8(float a, float b, float c, float d) {
  return to_fp8(a) | to_fp8(b) << 8 | to_fp8(c) << 16 | to_fp8(d) << 24;
}
uint32_t widen2(uint32_t codes);  // of products, which do not run here
constexpr float kFp8Max = 448.0f;

inline void pdl_launch() {}
inline void pdl_wait() {
  if (block_of_thread != nullptr) block_of_thread->running->waited = true;
}

// --- Tensors, which tests do not make -------------------------------------------------------------------------------

struct TensorView {
  int64_t size(int) const;
};
void check_rank(const char*, const TensorView&, int);
cudaStream_t stream_of(const TensorView&);
#define TVM_FFI_DLL_EXPORT_TYPED_FUNC(name, function)
template <typename T>
T* checked(const char*, const TensorView&, std::initializer_list<int64_t>);
#define TVM_FFI_THROW(kind) std::cerr

template <typename... Params, typename... Args>
void launch(void (*kernel)(Params...), dim3 grid, dim3 block, size_t, cudaStream_t, Args&&... args) {
  for (unsigned y = 0; y < grid.y; ++y) {
    for (unsigned x = 0; x < grid.x; ++x) {
      run_block(grid, dim3(x, y), 0, static_cast<int>(block.x), [&] {
        kernel(Params(args)...);
        store_pending();
      });
    }
  }
}

// --- Barriers in shared memory and bulk copies ----------------------------------------------------------------------

struct Barrier {
  int count = 0, pending = 0, phase = 0;
  int64_t bytes = 0;
};
inline std::mutex barrier_mutex;
inline std::condition_variable barrier_changed;
inline std::map<uint64_t*, Barrier> barriers;
inline uint8_t* shared_base;
inline std::atomic<bool> gave_up;  // a barrier was waited for in vain, and none is waited for any more

inline void advance(Barrier& barrier) {  // with the mutex
  if (barrier.pending == 0 && barrier.bytes == 0) {
    barrier.pending = barrier.count, ++barrier.phase;
    barrier_changed.notify_all();
  }
}
inline void barrier_init(uint64_t* at, int count) {
  const std::lock_guard lock(barrier_mutex);
  barriers[at] = {count, count, 0, 0};
}
inline void barrier_expect(uint64_t* at, uint32_t bytes) {
  const std::lock_guard lock(barrier_mutex);
  Barrier& barrier = barriers.at(at);
  barrier.bytes += bytes, --barrier.pending;
  advance(barrier);
}
inline void barrier_arrive(uint64_t* at) { barrier_expect(at, 0); }
inline void barrier_wait(uint64_t* at, uint32_t parity) {
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::seconds(10);
  std::unique_lock lock(barrier_mutex);
  const auto done = [&] { return gave_up || (barriers.at(at).phase & 1u) != parity; };
  if (done()) return;
  if (block_of_thread == nullptr && barrier_changed.wait_until(lock, deadline, done)) return;
  while (block_of_thread != nullptr && std::chrono::steady_clock::now() < deadline) {
    lock.unlock();
    let_others_run();  // it may wait for what another thread of its block copies
    lock.lock();
    if (barrier_changed.wait_for(lock, std::chrono::milliseconds(1), done)) return;
  }
  gave_up = true;
  barrier_changed.notify_all();
}

inline uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(static_cast<const uint8_t*>(p) - shared_base);
}
inline std::atomic<int64_t> early_bytes;  // copied by threads that had not waited
inline void bulk_copy(uint32_t target, const void* source, uint32_t bytes, uint64_t* at) {
  if (!has_waited()) early_bytes += bytes;
  source = as_seen(source);
  if (bytes % 16 != 0 || target % 16 != 0 || reinterpret_cast<uintptr_t>(source) % 16 != 0) gave_up = true;
  {
    const std::lock_guard lock(memory_mutex);
    std::memcpy(shared_base + target, source, bytes);
  }
  const std::lock_guard lock(barrier_mutex);
  Barrier& barrier = barriers.at(at);
  barrier.bytes -= bytes;
  advance(barrier);
}
inline void await_loaded(uint32_t) {}
inline void async_proxy_fence() { store_pending(); }

struct RingPlace {
  int slot = 0;
  uint32_t parity = 0;
  void advance(int size) {
    if (++slot == size) slot = 0, parity ^= 1;
  }
};

inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline float fast_exp2(float x) { return std::exp2(x); }
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

}  // namespace tpserve::cuda
