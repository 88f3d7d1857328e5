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

/// Which tokens the units of a block's run need, one unit after the other: of up to 128 tokens, all of them.
struct NarrowUnits {
  static constexpr int token = 0;
  int k;  // unit within its tile

  template <typename Params>
  constexpr NarrowUnits(const Params& p, const NarrowRun& run) : k(run.first % p.units_of_k) {}
  template <typename Params>
  constexpr void advance(const Params& p) {
    if (++k == p.units_of_k) k = 0;
  }
};

/// Of more: those of a tile.
struct WideUnits {
  int k;                       // unit within its tile
  int token, block;            // first token, first 64 channels
  int first_token, end_token;  // of the run's tiles

  template <typename Params>
  constexpr WideUnits(const Params& p, const WideRun& run) {
    const WidePlan& w = p.plan;
    const int tile = run.first / w.units_of_k;
    k = run.first - tile * w.units_of_k;
    first_token = run.member * w.tile_tokens, end_token = first_token + w.run_tokens * w.tile_tokens;
    token = first_token + tile % w.run_tokens * w.tile_tokens;
    block = tile / w.run_tokens * kWideBlocks;
  }
  /// Whether the next unit begins a tile.
  template <typename Params>
  constexpr bool advance(const Params& p) {
    if (++k != p.plan.units_of_k) return false;
    k = 0, token += p.plan.tile_tokens;
    if (token == end_token) token = first_token, block += kWideBlocks;
    return true;
  }
};

/// The weights of 64 channels of a wide tile's units: half a packed stage each. Where they are is kept, not found anew.
struct WideWeights {
  const uint8_t* source;
  WeightCursor stage;
  int half;

  /// Of unit `k` of 64 channels `block`, which there are.
  template <typename Params>
  constexpr void start(const Params& p, int block, int k) {
    stage.start(p, block * p.packed_k + k / 2), half = k % 2;
    source = stage.address(p, half);
  }
  /// To the next unit of the same tile.
  template <typename Params>
  constexpr void advance(const Params& p) {
    half ^= 1;
    if (half != 0) {
      source += kTileBytes;
      return;
    }
    const int run = stage.run;
    stage.advance(p);
    source = stage.run == run ? source + (kGrid * kStageBytes - kTileBytes) : stage.address(p, 0);
  }
};

}  // namespace tpserve::cuda
