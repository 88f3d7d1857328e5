// Hopper's instructions: barriers in shared memory, bulk and tensor copies, warp-group matrix products.
#pragma once

#include "common.cuh"

namespace tpserve::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

/// `value`, which from here on stands in a register of this thread: what the compiler would find anew with each use.
__device__ __forceinline__ uint32_t in_register(uint32_t value) {
  asm volatile("" : "+r"(value));
  return value;
}

/// Whether this is the one lane of its warp that works. By all lanes; the compiler knows that there is one.
__device__ __forceinline__ bool elected() {
  uint32_t is_it;
  asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\nselp.b32 %0, 1, 0, one;\n}" : "=r"(is_it));
  return is_it != 0;
}

__device__ __forceinline__ void barrier_init(uint64_t* barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(count) : "memory");
}

/// After the inits, by the thread that did them, before a __syncthreads.
__device__ __forceinline__ void barrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\nfence.proxy.async.shared::cta;" ::: "memory");
}

/// `barrier`: its address in shared memory.
__device__ __forceinline__ void barrier_expect(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void barrier_expect(uint64_t* barrier, uint32_t bytes) {
  barrier_expect(shared_address(barrier), bytes);
}

__device__ __forceinline__ void barrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

__device__ __forceinline__ void barrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra again;\n"
      "finished:\n"
      "}" ::"r"(barrier),
      "r"(parity)
      : "memory");
}
__device__ __forceinline__ void barrier_wait(uint64_t* barrier, uint32_t parity) {
  barrier_wait(shared_address(barrier), parity);
}

/// Of a warp's 8 x 8 matrix of 16 bits, a row by four lanes, two elements each.
__device__ __forceinline__ uint32_t transpose_8x8(uint32_t v) {
  uint32_t r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(v));
  return r;
}

/// Ends when `word` is in its register. Before an arrival that lets bulk copies overwrite shared memory, of words that all
/// of the warp's loads from it have a part in: the arrival alone does not wait for loads. They queue behind the stores of
/// other warps, and behind stores to other GPUs they were seen to read what the copy after the arrival brought.
__device__ __forceinline__ void await_loaded(uint32_t word) {
  // Only an instruction that takes the word waits for it. A nap would do no harm.
  asm volatile("{\n.reg .pred p;\nsetp.eq.u32 p, %0, 0x7fc0dead;\n@p nanosleep.u32 20;\n}" ::"r"(word) : "memory");
}

/// kThreads of the block, whole warps, meet at one of its barriers.
template <int kBarrier, int kThreads>
__device__ __forceinline__ void meet() {
  asm volatile("bar.sync %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
}

/// Takes part, whole warps, without waiting for those who `meet` there.
template <int kBarrier, int kThreads>
__device__ __forceinline__ void arrive() {
  asm volatile("bar.arrive %0, %1;" ::"n"(kBarrier), "n"(kThreads) : "memory");
}

/// As `meet` at a barrier that is not known before.
template <int kThreads>
__device__ __forceinline__ void meet_at(int barrier) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

/// Changes how many registers each thread of a warp group has: more, when other groups of the block have given some back.
template <int kRegisters, bool kMore>
__device__ __forceinline__ void set_registers() {
  if constexpr (kMore) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
  }
}

/// A place in a ring of buffers and the parity its barriers are waited for with.
struct RingPlace {
  int slot = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance(int size) {
    if (++slot == size) slot = 0, parity ^= 1;
  }
};

/// What this thread has written can be read by bulk copies, its own and those of threads that it syncs with afterwards.
__device__ __forceinline__ void async_proxy_fence() { asm volatile("fence.proxy.async;" ::: "memory"); }

/// Copies `bytes` (a multiple of 16) and reports them to the barrier.
__device__ __forceinline__ void bulk_copy(uint32_t target, const void* source, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
               "l"(source), "r"(bytes), "r"(barrier)
               : "memory");
}
__device__ __forceinline__ void bulk_copy(uint32_t target, const void* source, uint32_t bytes, uint64_t* barrier) {
  bulk_copy(target, source, bytes, shared_address(barrier));
}

/// The same for data read once, which need not stay in L2.
__device__ __forceinline__ void bulk_copy_once(uint32_t target, const void* source, uint32_t bytes, uint32_t barrier,
                                               uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::"r"(
          target),
      "l"(source), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

__device__ __forceinline__ uint64_t evict_first_policy() {
  uint64_t policy;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

}  // namespace tpserve::cuda
