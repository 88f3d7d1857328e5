// How a warp of a GEMM sends a finished tile of 16 channels x 8 tokens to where a reduction wants it; plain functions, so
// that the host's tests run them too.
//
// A lane comes with two words of token lane / 4, each a pair of channels: 2 (lane % 4) and the next, and those eight further
// on. Four lanes exchange theirs, so that each has one of the token's two 16-byte vectors, and two have the same one: lanes
// 4i and 4i + 1 together store a whole sector of 32 bytes, lanes 4i + 2 and 4i + 3 the same one to other ranks.
#pragma once

#include "push_places.cuh"

namespace tpserve::cuda {

constexpr int kMaxPushedRows = 64;  // of a call; with more, a GEMM's tiles take turns and its sums go by memory
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

/// Where a lane's vectors go.
struct TileSender {
  bool one_shot;
  int rank, num_ranks;
  int token, share;    // token of eight; which of the two lanes with this vector
  size_t first, step;  // place of the first eight tokens' vector, and from one eight to the next

  /// `vector`: of the row, the tile's first. Ranks are 2, 4 or 8, so eight tokens further on the owner is the same.
  TPSERVE_PLACE TileSender(const Places& places, bool is_one_shot, int own_rank, unsigned buffer, int lane, int vector)
      : one_shot(is_one_shot),
        rank(own_rank),
        num_ranks(places.num_ranks),
        token(lane / 4),
        share(lane % 4 / 2),
        first((one_shot ? places.one_shot(buffer, rank, token) : places.two_shot(buffer, rank, token)) + vector + lane % 2),
        step(one_shot ? places.one_shot(0, 0, 8) : places.two_shot(0, 0, 8)) {}

  /// Calls `send(holder, place)` for the ranks that get tokens 8 `eight` and following from this lane, the own one included.
  template <typename Send>
  TPSERVE_PLACE void send(int eight, Send send) const {
    const size_t place = first + eight * step;
    if (!one_shot) {
      if (share == 0) send(token & (num_ranks - 1), place);
      return;
    }
    for (int i = 1 + share; i <= num_ranks; i += 2) {  // each rank begins with another peer and ends with itself
      send((rank + i) & (num_ranks - 1), place);
    }
  }
};

}  // namespace tpserve::cuda
