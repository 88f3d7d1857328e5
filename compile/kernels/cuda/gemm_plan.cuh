// How the units of a wide product (more than 128 tokens) are dealt to the blocks of the grid. Integers only, so that the
// host, which makes a plan, the device, which follows it, and a test agree.
//
// A tile is `kBlocks` times 64 channels by `kTokens` tokens, a unit 128 bytes of K of it. A team is `team` neighbouring
// blocks: they go through the same channels and K at the same time, each with its own token tile, so that weights come
// from memory once. A tile's units are cut into `pieces`, equal but for one unit; teams take runs of whole pieces:
//   as many pieces as units: stream-K, all runs equal but for one unit; a tile's first block adds the sums of the others;
//   one: whole tiles, of which nothing is added;
//   some, a run being one piece: sliced. All blocks of a tile end at about the same time, and each finishes its share of
//   the tokens, so that none waits for one that adds everything.
#pragma once

#include <cstdint>
#include <initializer_list>

/// Candidates, as bits (below). Zero is the order and the tiles as they were measured in gpu_gemm_tiles.json.
#ifndef TPSERVE_WIDE
#define TPSERVE_WIDE 0
#endif

namespace tpserve::cuda {

constexpr int kGrid = 132;  // blocks, one per multiprocessor; part of the packed layout

enum WideFeature : unsigned {
  kWideEnds = 1,     // a tile's end waits less: scales of all tokens at once, more partial sums at once, wider stores
  kWideTeams = 2,    // token tiles of the same weights at the same time
  kWidePieces = 4,   // tile, and whole tiles, slices or stream-K, by estimated time
  kWideThree = 8,    // tiles of 192 channels too, three groups of consumers
  kWideRotate = 16,  // whole tiles begin at different places of K, so that not all blocks read the same tokens at once
  kWideLean = 32,    // of 1: without three more warps that only leave their registers, so that kernels beside find some
};
constexpr unsigned kWide = TPSERVE_WIDE;
static_assert(kWide < 64, "TPSERVE_WIDE has six bits");
static_assert(!(kWide & (kWideThree | kWideRotate)) || (kWide & kWidePieces), "TPSERVE_WIDE: 8 and 16 need 4");

struct WidePlan {
  int units_of_k;         // of a tile
  int team, run_tokens;   // blocks of a team; token tiles that one block's run goes through
  int pieces;             // of a tile
  int base, rem;          // pieces of team t: base + (t < rem)
  bool sliced, rotated;

  constexpr int teams() const { return kGrid / team; }
  constexpr int first_piece(int t) const { return base * t + (t < rem ? t : rem); }
  /// The first unit of a piece, tile after tile.
  constexpr int unit(int piece) const {
    return piece / pieces * units_of_k + piece % pieces * units_of_k / pieces;
  }
  /// Where a team's tiles begin in K; even, since packed weights are 256 bytes of K.
  constexpr int first_k(int t) const { return rotated ? t * units_of_k / teams() & ~1 : 0; }
};

/// What block `cta` does; nothing, if it is in no team.
struct WideRun {
  int team, member;
  int piece, pieces_end, first, end;  // pieces and units

  constexpr WideRun(const WidePlan& w, int cta)
      : team(cta / w.team), member(cta % w.team), piece(0), pieces_end(0), first(0), end(0) {
    if (team >= w.teams()) return;
    piece = w.first_piece(team), pieces_end = w.first_piece(team + 1);
    first = w.unit(piece), end = w.unit(pieces_end);
  }
  /// Of a tile that this run starts and does not end: the teams after this one that have a part of it.
  constexpr int sharers(const WidePlan& w, int tile) const {
    int count = 0;
    for (int covered = pieces_end; covered < (tile + 1) * w.pieces;) covered += w.base + (team + ++count < w.rem);
    return count;
  }
};

/// The plan for `channel_tiles` x `token_tiles` tiles with a tile cut into `pieces`, at most units_of_k.
constexpr WidePlan plan_wide(int channel_tiles, int token_tiles, int units_of_k, int pieces, unsigned features) {
  WidePlan w{units_of_k, 1, token_tiles, pieces, 0, 0, false, false};
  // A few blocks may stay without work: that costs less than weights that are read twice.
  if (features & kWideTeams && token_tiles <= kGrid && kGrid % token_tiles <= 4) w.team = token_tiles, w.run_tokens = 1;
  const int64_t all = static_cast<int64_t>(channel_tiles) * w.run_tokens * pieces;
  w.base = static_cast<int>(all / w.teams()), w.rem = static_cast<int>(all % w.teams());
  w.sliced = features & kWidePieces && pieces > 1 && pieces < units_of_k && all <= w.teams();
  w.rotated = features & kWideRotate && pieces == 1;
  return w;
}

/// A tile and a plan, with the microseconds that they are estimated to take.
struct WideChoice {
  int tokens, blocks;
  WidePlan plan;
  float us;
};

/// Vectors of eight tokens whose partial sums are asked for at once.
constexpr int partial_batch(int tokens, int blocks, unsigned features) {
  const int vectors = tokens / 8;
  if (features & kWideEnds && !(features & kWideLean) && blocks == 2) return vectors <= 24 ? vectors : vectors / 2;
  return vectors <= 16 ? vectors : 4;
}

/// Estimated, for e4m3 and bfloat16 alike, for a unit has 128 bytes of K: to order plans, no more.
constexpr float estimated_us(const WidePlan& w, int tokens, int blocks, unsigned features) {
  constexpr float kUnit = 0.9f;        // 128 channels x 256 tokens; 0.58 at the tensor cores' rate
  constexpr float kBytesPerUs = 3e6f;  // from memory
  constexpr float kTrip = 0.8f;        // to L2 under load, for one batch of partial sums
  constexpr float kHandOver = 1.5f;    // until what others stored can be read
  // Mostly by what is fetched from L2, a part by products; or by what all teams fetch from memory.
  const float fetched = kUnit * (0.3f * blocks * tokens / 512 + 0.7f * (blocks * 64 + tokens) / 384);
  const float read = static_cast<float>(w.teams()) * blocks * 8192 / kBytesPerUs;
  const float unit = fetched > read ? fetched : read;
  const int vectors = tokens / 8, batch = partial_batch(tokens, blocks, features);
  const float end = 0.5f + 0.06f * vectors;
  const int longest = w.base + (w.rem > 0);  // pieces
  const float units = static_cast<float>((longest * w.units_of_k + w.pieces - 1) / w.pieces);
  if (w.pieces == 1) return units * unit + longest * end;
  if (w.sliced) {
    const int share = (vectors + w.pieces - 1) / w.pieces, trips = (share + batch - 1) / batch + (share % batch != 0);
    return units * unit + kHandOver + (w.pieces - 1) * trips * kTrip + 0.03f * vectors + end / w.pieces;
  }
  const int trips = (vectors + batch - 1) / batch;
  if (longest >= w.pieces) return units * unit + trips * kTrip + 0.03f * vectors + (longest / w.pieces + 1) * end;
  return units * unit + kHandOver + (w.pieces + longest - 1) / longest * trips * kTrip + 0.03f * vectors + end;
}

/// The width of tiles of 128 channels, as measured: `gpu_kernels.py` on an H200, every tile at every shape of 8B and 70B.
constexpr int measured_tokens(int M, int channel_blocks) {
  // Few channels: one tile of all tokens would be shared by so many blocks that adding their sums takes longer than the
  // products.
  if (M <= 256 && channel_blocks <= 128) return M <= 192 ? 96 : 128;
  if (M > 256 && M <= 320) return 160;
  return (M + 191) / 192 * 192 < (M + 255) / 256 * 256 ? 192 : 256;
}

/// For M tokens, channels in blocks of 64, and units of 128 bytes of K.
constexpr WideChoice choose_wide(int M, int channel_blocks, int units_of_k, unsigned features) {
  const auto plan = [&](int tokens, int blocks, int pieces) {
    return plan_wide((channel_blocks + blocks - 1) / blocks, (M + tokens - 1) / tokens, units_of_k, pieces, features);
  };
  if (!(features & kWidePieces)) {
    const int tokens = measured_tokens(M, channel_blocks);
    return {tokens, 2, plan(tokens, 2, units_of_k), 0.0f};
  }
  constexpr int kTiles[][2] = {{256, 2}, {192, 2}, {160, 2}, {128, 2}, {96, 2}, {256, 3}, {192, 3}};
  constexpr int kMostSlices = 8;
  WideChoice best{0, 0, {}, 0.0f};
  for (const auto& [tokens, blocks] : kTiles) {
    if (blocks == 3 && !(features & kWideThree)) continue;
    const WidePlan whole = plan(tokens, blocks, 1);
    const int tiles = (channel_blocks + blocks - 1) / blocks * whole.run_tokens;
    const int fitting = whole.teams() / tiles, most = fitting < kMostSlices ? fitting : kMostSlices;
    for (const int pieces : {1, most, units_of_k}) {
      if (pieces < 1 || pieces > units_of_k) continue;
      const WidePlan w = plan(tokens, blocks, pieces);
      const float us = estimated_us(w, tokens, blocks, features);
      if (best.blocks == 0 || us < best.us) best = {tokens, blocks, w, us};
    }
  }
  return best;
}

}  // namespace tpserve::cuda
