// Where rows are in the buffers of a workspace, and which places a call frees; plain functions, so that the host's tests
// run them too. All in 16-byte vectors.
//
// Rows are as far apart as the longest that the group reduces, whatever a call's rows are: so that models of several
// hidden sizes take turns in the same buffers. What a call must free was written by the call before, perhaps for another
// model: with other rows and other vectors in each, which is why both are kept with the buffer.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef __CUDACC__
#define TPSERVE_PLACE __host__ __device__ __forceinline__
#else
#define TPSERVE_PLACE inline
#endif

namespace tpserve::cuda {

constexpr int kMaxRanks = 8;
constexpr int kBuffers = 3;
constexpr int kPieceRows = 512;    // most rows of one launch; more go in pieces
constexpr int kOneShotRows = 128;  // most rows that are sent to everybody

/// Sizes of the buffers, the same on all ranks and for all calls.
struct Places {
  int num_ranks;
  int row_vectors;  // from one row to the next

  /// Rows that one rank reduces of a launch.
  TPSERVE_PLACE int owned_rows() const { return (kPieceRows + num_ranks - 1) / num_ranks; }

  /// [buffer][source][row]: rows that are sent to everybody.
  TPSERVE_PLACE size_t one_shot(unsigned buffer, int source, unsigned row) const {
    return ((static_cast<size_t>(buffer) * num_ranks + source) * kOneShotRows + row) * row_vectors;
  }

  /// [buffer][source][row / ranks]: rows that the holder reduces.
  TPSERVE_PLACE size_t two_shot(unsigned buffer, int source, unsigned row) const {
    return ((static_cast<size_t>(buffer) * num_ranks + source) * owned_rows() + row / num_ranks) * row_vectors;
  }

  /// [buffer][row]: reduced rows that others send.
  TPSERVE_PLACE size_t reduced(unsigned buffer, unsigned row) const {
    return (static_cast<size_t>(buffer) * kPieceRows + row) * row_vectors;
  }

  /// [buffer][row]: their scales, in words.
  TPSERVE_PLACE size_t scale(unsigned buffer, unsigned row) const {
    return static_cast<size_t>(buffer) * kPieceRows + row;
  }
};

/// What the last call in a buffer used of it.
struct Used {
  unsigned rows, vectors;  // vectors of each row
};

/// Of the threads of a call: the one of vector `vector`, of `threads` in row `row`, of `rows` in the call. Together they
/// give all places once.
struct Worker {
  unsigned row, rows, vector, threads;
};

/// Calls `clear(place)` for this thread's part of what one-shot call `used` has received in `buffer`. A rank's own part is
/// there if its GEMM has sent it; else its places are free anyway.
template <int kRanks, typename Clear>
TPSERVE_PLACE void free_one_shot(const Places& places, unsigned buffer, Used used, Worker w, Clear clear) {
  for (unsigned row = w.row; row < used.rows; row += w.rows) {
    for (unsigned v = w.vector; v < used.vectors; v += w.threads) {
#pragma unroll
      for (int source = 0; source < kRanks; ++source) clear(places.one_shot(buffer, source, row) + v);
    }
  }
}

/// The same of a two-shot call: `clear_part(place)` of rows that rank `rank` reduced, `clear_row(place)` and
/// `clear_scale(place)` of those that it was sent reduced.
template <int kRanks, typename ClearPart, typename ClearRow, typename ClearScale>
TPSERVE_PLACE void free_two_shot(const Places& places, int rank, unsigned buffer, Used used, Worker w,
                                 ClearPart clear_part, ClearRow clear_row, ClearScale clear_scale) {
  for (unsigned row = w.row; row < used.rows; row += w.rows) {
    const bool own_it = static_cast<int>(row % kRanks) == rank;
    for (unsigned v = w.vector; v < used.vectors; v += w.threads) {
      if (own_it) {
#pragma unroll
        for (int source = 0; source < kRanks; ++source) clear_part(places.two_shot(buffer, source, row) + v);
      } else {
        clear_row(places.reduced(buffer, row) + v);
      }
    }
    if (!own_it && w.vector == 0) clear_scale(places.scale(buffer, row));
  }
}

}  // namespace tpserve::cuda
