// What a GEMM needs to send its tiles straight into the ranks' workspaces; why this is safe is in peer.cuh.
#pragma once

#include "hopper.cuh"
#include "peer.cuh"
#include "push_lanes.cuh"

namespace tpserve::cuda {

struct PushTarget {
  uint8_t* base[kMaxRanks];  // of the buffers of the call's kind, in each rank's workspace
  const unsigned* epoch;     // calls of the kind so far, in the own workspace
  PushRows rows;
};

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

/// Takes a warp's tile of 16 channels x up to kMaxPushedRows tokens, eight tokens at a time.
class PeerTile {
 public:
  static constexpr bool kToPeers = true;

  __device__ __forceinline__ PeerTile(const PushTarget& target, unsigned epoch, int channel, int rows, int channels)
      : target_(target),
        sender_(target.rows, epoch % kBuffers, threadIdx.x % 32, channel / 8),
        rows_(channel / 8 + static_cast<int>(threadIdx.x % 2) < channels / 8 ? rows : 0) {}

  /// `pairs`: two words as push_lanes.cuh has them. All lanes of the warp come.
  __device__ __forceinline__ void store(int eight, const uint32_t (&pairs)[2]) const {
    const TileVector v = gather_vector(threadIdx.x % 32, pairs[0], pairs[1], [](uint32_t value, int mask) {
      return __shfl_xor_sync(~0u, value, mask);
    });
    if (eight * 8 + sender_.token >= rows_) return;
    const uint4 values = sendable(make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]));
    sender_.send(eight, [&](int holder, unsigned place) {
      store_peer(reinterpret_cast<uint4*>(target_.base[holder]) + place, values);
    });
  }

 private:
  const PushTarget& target_;
  TileSender sender_;
  int rows_;  // that this lane sends
};

}  // namespace tpserve::cuda
