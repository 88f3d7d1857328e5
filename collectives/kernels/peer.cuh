// What collectives over peer memory share: the workspace, loads and stores that other GPUs see, and waiting with a deadline.
//
// Every rank owns one workspace, mapped by all others. Data travel by 16-byte stores into the receiver's workspace and are
// their own flag: a place that was not written holds the word 0xffffffff, a NaN that no arithmetic makes, and the sender
// replaces that word by another NaN. Three buffers take turns. A call frees the buffer of the call before, after which two
// more calls pass before anybody writes there again: a peer that starts call e + 3 has ended e + 2, which needed this rank's
// part of e + 2, which came after this rank's e + 1 had ended.
//
// A call's parts are sent by its reduction, or pushed by the GEMM that makes them (push_tile.cuh), which then is the kernel
// before the reduction and still runs when that starts. Why this is safe:
//   - The count of calls. The reduction advances it as soon as all its threads have read it. The GEMM reads it in one thread
//     of each block, after all kernels before have ended, and only then calls `pdl_launch`; the reduction starts once all
//     blocks have. So both of them find the same count, and neither finds the one of another call.
//   - What the reduction reads: the residual stream and what there is to free were written before the GEMM, and are whole
//     for the same reason. It need not wait for the GEMM to end, since the parts are their own flags.
//   - What it writes: outputs of one call of a graph, which share no memory with that call's inputs, so none with what the
//     GEMM still reads. This is why both are one call. Memory of values that were dead before the call may be written: who
//     read them has ended.
//   - Its end. It waits for the GEMM before it ends, so whoever waits for its end may reuse the GEMM's input and workspace.
//   - The buffers. A GEMM of call e + 3 pushes after its rank's reduction e + 2 has ended, as the argument above has it: that
//     needed this rank's part of e + 2, which this rank's GEMM pushed after its reduction e + 1 had ended, and that one freed
//     the buffer of e. So pushed and other calls may take turns. The own part lies in the own workspace, and is freed too.
//   - Progress. The GEMM's blocks wait for each other, and all of them run before the reduction's first block starts; for
//     other ranks they do not wait. The reduction's blocks may fill multiprocessors while they wait, and may come in several
//     waves: what the first rows wait for are GEMMs that run and, for rows of others, reductions of the same rows, which
//     start first everywhere. The kernel after the reduction starts when all blocks of that one run.
//
// Models may share a workspace, say a target and its draft, within one captured graph and between graphs. The argument
// above is about calls, not about whose they are: it needs that each rank queues the same calls in the same order on one
// stream. All ranks get the same plans and launch the same graphs, in which the order of kernels is fixed, so they do. A
// call's rows, their size and with them its kind are the same on all ranks too, so each counts the same one-shot, two-shot
// and gathering calls, on the device, where replayed graphs find the count as the last launch left it.
#pragma once

#include "common.cuh"
#include "push_places.cuh"

namespace tpserve::cuda {

constexpr uint32_t kEmpty = ~0u;
constexpr int kGatherBlocks = 128;

/// Counters of one kind of call, in its own rank's memory, zero at the start.
struct Turn {
  unsigned epoch;       // calls so far
  unsigned arrived;     // blocks of the present call that have read it
  Used used[kBuffers];  // by the last call in each buffer
};

struct Control {
  Turn one_shot, two_shot, gather;
  unsigned late;           // 1 + the rank that a wait gave up on; 0 while all is well
  unsigned* late_on_host;  // the same for the host, so that no step needs a copy of it
  unsigned flags[kMaxRanks][kGatherBlocks];  // all-gather: calls whose part has come, by source and block
};

/// Where the buffers of `Places` begin in a workspace, in bytes; the same on all ranks.
struct Workspace {
  size_t one_shot;
  size_t two_shot;
  size_t rows;
  size_t scales;
  size_t gather;    // [2][source][bytes]
  size_t total;
};

inline Workspace workspace_of(int64_t world_size, int64_t max_hidden, int64_t gather_bytes) {
  const auto aligned = [](size_t bytes) { return (bytes + 1023) / 1024 * 1024; };
  const Places places{static_cast<int>(world_size), static_cast<int>(max_hidden / 8)};
  const size_t ranks = static_cast<size_t>(world_size), vector = sizeof(uint4);
  Workspace w{};
  w.one_shot = aligned(sizeof(Control));
  w.two_shot = w.one_shot + aligned(places.one_shot(kBuffers, 0, 0) * vector);  // the first place behind the last buffer
  w.rows = w.two_shot + aligned(places.two_shot(kBuffers, 0, 0) * vector);
  w.scales = w.rows + aligned(places.reduced(kBuffers, 0) * vector);
  w.gather = w.scales + aligned(places.scale(kBuffers, 0) * sizeof(float));
  w.total = w.gather + aligned(2 * ranks * static_cast<size_t>(gather_bytes));
  return w;
}

__device__ __forceinline__ uint4 load_peer(const uint4* p) {
  uint4 v;
  asm volatile("ld.relaxed.sys.global.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p)
               : "memory");
  return v;
}
__device__ __forceinline__ uint2 load_peer(const uint2* p) {
  uint2 v;
  asm volatile("ld.relaxed.sys.global.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ uint32_t load_peer(const uint32_t* p) {
  uint32_t v;
  asm volatile("ld.relaxed.sys.global.u32 %0, [%1];" : "=r"(v) : "l"(p) : "memory");
  return v;
}
__device__ __forceinline__ void store_peer(uint4* p, uint4 v) {
  asm volatile("st.relaxed.sys.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}
__device__ __forceinline__ void store_peer(uint2* p, uint2 v) {
  asm volatile("st.relaxed.sys.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(v.x), "r"(v.y) : "memory");
}
__device__ __forceinline__ void store_peer(uint32_t* p, uint32_t v) {
  asm volatile("st.relaxed.sys.global.u32 [%0], %1;" ::"l"(p), "r"(v) : "memory");
}

// Per word: nothing is assumed of the atomicity of 16 bytes.
__device__ __forceinline__ bool has_come(uint4 v) { return v.x != kEmpty && v.y != kEmpty && v.z != kEmpty && v.w != kEmpty; }
__device__ __forceinline__ bool has_come(uint2 v) { return v.x != kEmpty && v.y != kEmpty; }
__device__ __forceinline__ bool has_come(uint32_t v) { return v != kEmpty; }

/// Replaces the word that means "not come" by another NaN of the type.
__device__ __forceinline__ uint32_t sendable(uint32_t w, uint32_t other) { return w == kEmpty ? other : w; }
__device__ __forceinline__ uint4 sendable(uint4 v) {
  constexpr uint32_t kNan = 0x7FFF7FFFu;  // two of bfloat16
  return {sendable(v.x, kNan), sendable(v.y, kNan), sendable(v.z, kNan), sendable(v.w, kNan)};
}
__device__ __forceinline__ uint2 sendable(uint2 v) {
  constexpr uint32_t kNan = 0x7F7F7F7Fu;  // four of e4m3
  return {sendable(v.x, kNan), sendable(v.y, kNan)};
}

/// A wait gives up when its deadline has passed, or soon after another one did. It notes
/// in `control->late`, which is `Control`'s or a link's, who was late.
struct Patience {
  unsigned tries = 0;
  uint64_t since = 0;

  template <typename C>
  __device__ __forceinline__ bool is_over(C* control, uint64_t timeout_ns, int late_rank) {
    if (++tries % 1024 != 0) return false;
    if (*static_cast<volatile unsigned*>(&control->late) != 0) return true;
    uint64_t now;
    asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
    if (since == 0) since = now;
    if (now - since < timeout_ns) return false;
    const unsigned word = static_cast<unsigned>(late_rank) + 1;
    if (atomicCAS(&control->late, 0u, word) == 0) {
      *static_cast<volatile unsigned*>(control->late_on_host) = word;
      __threadfence_system();
    }
    return true;
  }
};

/// Called by all threads after they have read the epoch: the last block to come advances it. Without the barrier a slow
/// warp would read the next call's.
__device__ __forceinline__ void advance(Turn* turn, unsigned epoch, Used used) {
  __syncthreads();
  if (threadIdx.x != 0) return;
  if (atomicAdd(&turn->arrived, 1u) != gridDim.x - 1) return;
  turn->arrived = 0;
  turn->used[epoch % kBuffers] = used;
  __threadfence();
  // 2^32 - 1 is a multiple of three, so the order of buffers survives the wrap.
  *static_cast<volatile unsigned*>(&turn->epoch) = epoch == 0xFFFFFFFEu ? 0 : epoch + 1;
}

}  // namespace tpserve::cuda
