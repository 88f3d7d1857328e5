// How a warp group of a GEMM sends a finished tile of 64 channels to where a reduction wants it; plain functions, so that
// the host's tests run them too.
//
// A warp has 16 channels, of a token 32 bytes. They go by a stage in shared memory, up to 64 tokens at a time, from which
// eight lanes send 128 bytes of a token: with 32 the way to the peers was what a step waited for (benchmarks/README.md).
#pragma once

#include "push_places.cuh"

namespace tpserve::cuda {

constexpr int kMaxPushedRows = kPieceRows;  // of a call; of more, its GEMM's sums go by memory
constexpr int kStageTokens = 64;
constexpr int kStageStride = 144;  // bytes from token to token: 16 more than there are, for other banks
constexpr int kStageThreads = 128;

/// Where a stage has a channel of its tile of a token, in bytes.
TPSERVE_PLACE int staged_at(int token, int channel) { return token * kStageStride + channel * 2; }

/// Where a rank's rows go in the buffers of one kind of call: `Places`, without a division.
struct PushRows {
  bool one_shot;
  int rank, num_ranks;
  int shift;                     // row t is the (t >> shift)th that its holder gets
  unsigned source, buffer, row;  // place of the first row in buffer 0, from buffer to buffer, from a holder's row to its next

  /// The group has 2, 4 or 8 ranks.
  static TPSERVE_PLACE PushRows of(const Places& places, bool one_shot, int rank) {
    const int shift = one_shot ? 0 : places.num_ranks == 2 ? 1 : places.num_ranks == 4 ? 2 : 3;
    const size_t source = one_shot ? places.one_shot(0, rank, 0) : places.two_shot(0, rank, 0);
    const size_t buffer = one_shot ? places.one_shot(1, 0, 0) : places.two_shot(1, 0, 0);
    return {one_shot, rank, places.num_ranks, shift, static_cast<unsigned>(source), static_cast<unsigned>(buffer),
            static_cast<unsigned>(places.row_vectors)};
  }
};

/// What a thread of a warp group sends of a tile: one of the eight vectors of a token, of every sixteenth token.
struct TileSender {
  static constexpr int kVectors = 8, kStep = kStageThreads / kVectors;
  int token, vector;  // the first token of a stage; of the tile

  explicit TPSERVE_PLACE TileSender(int thread) : token(thread / kVectors), vector(thread % kVectors) {}

  /// Calls `send(holder, place)` for the ranks that get row `row`, the own one included. `first`: vectors before the tile's.
  template <typename Send>
  TPSERVE_PLACE void send(const PushRows& rows, unsigned buffer, int first, int row, Send send) const {
    const unsigned place = rows.source + buffer * rows.buffer + (row >> rows.shift) * rows.row + first + vector;
    const int last = rows.num_ranks - 1;
    if (!rows.one_shot) return send(row & last, place);
#pragma unroll
    for (int i = 1; i <= kMaxRanks; ++i) {  // each rank begins with another peer and ends with itself
      if (i <= rows.num_ranks) send((rows.rank + i) & last, place);
    }
  }
};

}  // namespace tpserve::cuda
