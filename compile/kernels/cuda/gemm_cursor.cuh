// Where the fetching warp of a GEMM is. Advanced by additions: a division takes as long as a unit's products.
// `Params` is GemmParams; a test on the host has its own.
#pragma once

#include <cstddef>
#include <cstdint>

#include "gemm_plan.cuh"

namespace tpserve::cuda {

constexpr int kStageBytes = 16384;
constexpr int kTileBytes = 8192;  // 64 channels x 128 bytes of K

/// Weights in the packed layout, of which a stage is 64 channels x 256 bytes of K.
struct PackedWeights {
  const uint8_t* weights;
  int packed_base, packed_rem;
  int packed_k;  // stages of a tile
};

/// Where the weights of consecutive stages of 64 channels are.
struct WeightCursor {
  int run, place, length;  // of the packed stage: which run, its place there, stages of the run

  template <typename Params>
  constexpr void start(const Params& p, int stage) {
    const int long_runs = p.packed_rem * (p.packed_base + 1);
    run = stage < long_runs ? stage / (p.packed_base + 1) : p.packed_rem + (stage - long_runs) / p.packed_base;
    place = stage - (p.packed_base * run + (run < p.packed_rem ? run : p.packed_rem));
    length = p.packed_base + (run < p.packed_rem);
  }
  template <typename Params>
  constexpr void advance(const Params& p) {
    if (++place < length) return;
    place = 0, length = p.packed_base + (++run < p.packed_rem);
  }
  template <typename Params>
  constexpr const uint8_t* address(const Params& p, int half) const {
    return p.weights + (static_cast<size_t>(place) * kGrid + run) * kStageBytes + half * kTileBytes;
  }
};

/// The units of a block's run, one after the other: of up to 128 tokens.
template <int kTokens, int kBlocks>
struct UnitCursor {
  static_assert(kBlocks == 1);
  static constexpr int token = 0;
  int k;  // unit within its tile
  WeightCursor weights[1];

  template <typename Params>
  constexpr UnitCursor(const Params& p, const NarrowRun& run) : k(run.first % p.units_of_k), weights{} {
    if (run.first < run.end) weights[0].start(p, run.first);
  }
  template <typename Params>
  constexpr void advance(const Params& p) {
    if (++k == p.units_of_k) k = 0;
    weights[0].advance(p);
  }
};

/// Of more tokens.
template <int kTokens, int kBlocks>
  requires(kBlocks > 1)
struct UnitCursor<kTokens, kBlocks> {
  int k;                       // unit within its tile
  int token, block;            // first token, first 64 channels
  int first_token, end_token;  // of the run's tiles
  WeightCursor weights[kBlocks];

  template <typename Params>
  constexpr UnitCursor(const Params& p, const WideRun& run) {
    const WidePlan& w = p.plan;
    const int tile = run.first / w.units_of_k;
    k = run.first - tile * w.units_of_k;
    first_token = run.member * w.tile_tokens, end_token = first_token + w.run_tokens * w.tile_tokens;
    token = first_token + tile % w.run_tokens * w.tile_tokens;
    block = tile / w.run_tokens * kBlocks;
    start_weights(p);
  }
  template <typename Params>
  constexpr void start_weights(const Params& p) {
#pragma unroll
    for (int i = 0; i < kBlocks; ++i) {
      const int at = block + i < p.channel_blocks ? block + i : p.channel_blocks - 1;
      weights[i].start(p, at * p.packed_k + k / 2);
    }
  }
  template <typename Params>
  constexpr void advance(const Params& p) {
    if (++k == p.plan.units_of_k) {
      k = 0, token += p.plan.tile_tokens;
      if (token == end_token) token = first_token, block += kBlocks;
      start_weights(p);
    } else if (k % 2 == 0) {
#pragma unroll
      for (int i = 0; i < kBlocks; ++i) weights[i].advance(p);
    }
  }
};

}  // namespace tpserve::cuda
