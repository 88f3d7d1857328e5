// What a GEMM needs to send its tiles straight into the ranks' workspaces; why this is safe is in peer.cuh.
#pragma once

#include "peer_tile.cuh"

namespace tpserve::cuda {

/// The call's epoch, on its way from the thread that may read it to those that send.
///
/// The reduction of the same call advances the epoch while this kernel still runs. So one thread reads it, between
/// `pdl_wait` and the `pdl_launch` that lets the reduction start, and all others of its block ask that thread.
struct PushEpoch {
  uint64_t ready;
  unsigned value;

  __device__ __forceinline__ void init() { barrier_init(&ready, 1); }

  /// After `pdl_wait`; what was read is needed only by `hand_over`, so the load flies meanwhile.
  static __device__ __forceinline__ unsigned read(const PushTarget& target) {
    unsigned epoch;
    asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(epoch) : "l"(target.epoch) : "memory");
    return epoch;
  }
  __device__ __forceinline__ void hand_over(unsigned epoch) {
    value = epoch;
    barrier_arrive(&ready);
  }
  __device__ __forceinline__ unsigned wait() {
    barrier_wait(&ready, 0);
    return value;
  }
};

}  // namespace tpserve::cuda
