// A tile on its way from a GEMM's registers to the ranks' workspaces. A test runs this on the host.
#pragma once

#include "hopper.cuh"
#include "peer.cuh"
#include "push_stage.cuh"

namespace tpserve::cuda {

struct PushTarget {
  uint8_t* base[kMaxRanks];  // of the buffers of the call's kind, in each rank's workspace
  const unsigned* epoch;     // calls of the kind so far, in the own workspace
  PushRows rows;
};

/// Takes a warp group's tile of 64 channels, stage by stage: `open`, then the tokens, then `send`, all by the whole group.
class PeerTile {
 public:
  static constexpr bool kToPeers = true;

  /// `channel`: the warp's first. `rows`, `channels`: of the call. `stage`: kStageTokens tokens of shared memory, and
  /// `barrier` one of the block's, both for this group alone.
  __device__ __forceinline__ PeerTile(const PushTarget& target, unsigned epoch, int channel, int rows, int channels,
                                      uint8_t* stage, int barrier)
      : target_(target),
        sender_(threadIdx.x % kStageThreads),
        buffer_(epoch % kBuffers),
        first_vector_(channel / 64 * TileSender::kVectors),
        rows_(first_vector_ + sender_.vector < channels / 8 ? rows : 0),
        stage_(stage),
        barrier_(barrier) {}

  /// Waits until the stage before is sent.
  __device__ __forceinline__ void open() const { meet_at<kStageThreads>(barrier_); }

  /// Of token `eight` * 8 + lane / 4 of the tile: channels 2 (lane % 4) and the next of the warp's, and those eight further on.
  __device__ __forceinline__ void store(int eight, const uint32_t (&pairs)[2]) const {
    const int lane = threadIdx.x % 32, token = eight * 8 % kStageTokens + lane / 4;
    uint8_t* const place = stage_ + staged_at(token, threadIdx.x % kStageThreads / 32 * 16 + lane % 4 * 2);
    *reinterpret_cast<uint32_t*>(place) = pairs[0];
    *reinterpret_cast<uint32_t*>(place + staged_at(0, 8)) = pairs[1];
  }

  /// Sends the stage's tokens from `from` to `to`; its first is row `row` of the call.
  __device__ __forceinline__ void send(int row, int from, int to) const {
    meet_at<kStageThreads>(barrier_);
    for (int token = from + sender_.token; token < to && row + token < rows_; token += TileSender::kStep) {
      const uint4 staged = *reinterpret_cast<const uint4*>(stage_ + staged_at(token, sender_.vector * 8));
      const uint4 values = sendable(staged);
      sender_.send(target_.rows, buffer_, first_vector_, row + token, [&](int holder, unsigned place) {
        store_peer(reinterpret_cast<uint4*>(target_.base[holder]) + place, values);
      });
    }
  }

 private:
  const PushTarget& target_;
  const TileSender sender_;
  const unsigned buffer_;
  const int first_vector_, rows_;  // of the tile; that this thread sends
  uint8_t* const stage_;
  const int barrier_;
};

}  // namespace tpserve::cuda
