// How a warp of a GEMM sends a finished tile of 16 channels x 8 tokens to where a reduction wants it; plain functions, so
// that the host's tests run them too.
//
// A lane comes with two words of token lane / 4, each a pair of channels: 2 (lane % 4) and the next, and those eight further
// on. Four lanes exchange theirs, so that each has one of the token's two 16-byte vectors, and two have the same one: lanes
// 4i and 4i + 1 together store a whole sector of 32 bytes, lanes 4i + 2 and 4i + 3 the same one to other ranks.
#pragma once

#include "push_places.cuh"

namespace tpserve::cuda {

constexpr int kMaxPushedRows = 128;  // of a call; with more, a GEMM's tiles take turns and its sums go by memory
static_assert(kMaxPushedRows <= kOneShotRows && kMaxPushedRows <= kPieceRows);

struct TileVector {
  uint32_t word[4];
};

/// The vector that this lane sends: of channels 0 to 7 of the tile if its number is even, of 8 to 15 if it is odd.
/// `exchange(value, mask)` gives what lane ^ mask put into the same call; all lanes come.
template <typename Exchange>
TPSERVE_PLACE TileVector gather_vector(int lane, uint32_t low, uint32_t high, Exchange exchange) {
  const bool odd = lane & 1, upper = lane & 2;
  const uint32_t kept = odd ? high : low, given = exchange(odd ? low : high, 1);
  const uint32_t a = odd ? given : kept, b = odd ? kept : given;  // words 0 and 1 of the vector, or 2 and 3
  const uint32_t c = exchange(a, 2), d = exchange(b, 2);
  return upper ? TileVector{{c, d, a, b}} : TileVector{{a, b, c, d}};
}

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

/// Where a lane's vectors go.
struct TileSender {
  PushRows rows;
  int token, share;      // token of eight; which of the two lanes with this vector
  unsigned first, step;  // place of the first eight tokens' vector, and from one eight to the next

  /// `vector`: of the row, the tile's first.
  TPSERVE_PLACE TileSender(const PushRows& all, unsigned buffer, int lane, int vector)
      : rows(all),
        token(lane / 4),
        share(lane % 4 / 2),
        first(rows.source + buffer * rows.buffer + (token >> rows.shift) * rows.row + vector + lane % 2),
        step((8 >> rows.shift) * rows.row) {}

  /// Calls `send(holder, place)` for the ranks that get tokens 8 `eight` and following from this lane, the own one included.
  template <typename Send>
  TPSERVE_PLACE void send(int eight, Send send) const {
    const unsigned place = first + eight * step;
    if (!rows.one_shot) {
      if (share == 0) send(token & (rows.num_ranks - 1), place);
      return;
    }
#pragma unroll
    for (int i = 0; i < kMaxRanks; i += 2) {  // each rank begins with another peer and ends with itself
      if (i + share < rows.num_ranks) send((rows.rank + 1 + i + share) & (rows.num_ranks - 1), place);
    }
  }
};

}  // namespace tpserve::cuda
