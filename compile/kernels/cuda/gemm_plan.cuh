// How the units of a product are dealt to the blocks of the grid. A plan is of integers only, so that the host, which makes
// it, the device, which follows it, and a test agree.
//
// Few tokens: in runs along (channels, K), whole tiles where these nearly fill the grid. More tokens, wide products: a tile
// is 128 channels by as many tokens as the plan says, a unit 128 bytes of K of it. A team is `team` neighbouring blocks:
// they go through the same channels and K at the same time, each with its own token tile, so that weights come
// from memory once. A tile is whole, or cut along K into `pieces`, equal but for one unit:
//   one piece: teams take runs of whole tiles, of which nothing is added;
//   more: no team has two. All blocks of a tile end at about the same time, and each finishes its share of the tokens, so
//   that none waits for one that adds everything.
#pragma once

#include <cstdint>
#include <initializer_list>

namespace tpserve::cuda {

constexpr int kGrid = 132;      // blocks, one per multiprocessor; part of the packed layout
constexpr int kWideBlocks = 2;  // of 64 channels, in a tile

/// Of a product of few tokens, whose units are 64 channels x 256 bytes of K, tile after tile.
struct NarrowPlan {
  int grid, base, rem;  // blocks; units of block c: base + (c < rem)
  int pieces = 0;       // if any, each tile is cut into so many instead, equal but for one unit
  int units_of_k = 0;

  constexpr int first(int cta) const {
    if (pieces > 0) return cta / pieces * units_of_k + cta % pieces * units_of_k / pieces;
    return base * cta + (cta < rem ? cta : rem);
  }
};

/// What a block does of it: units.
struct NarrowRun {
  int first, end;
};

/// Of up to kMostShort tokens, tiles so short that half of one fits in half a ring are cut in two, though that leaves
/// multiprocessors without work: their weights are there before the tokens, and each partial sum is a wait.
///
/// Else, for up to kMostAligned tokens, each block has whole tiles, or each tile equally many blocks, where that leaves few
/// multiprocessors without work; else each block has as many units as the others, which of more tokens costs less. Equally many
/// blocks whose units are not as many pay where the sums that are exchanged are of kLeastUneven tokens or more.
constexpr NarrowPlan plan_narrow(int tiles, int units_of_k, int tokens) {
  // As measured in steps (benchmarks/README.md).
  constexpr int kLeastGrid = 120, kMostAligned = 96, kLeastUneven = 32, kMostShort = 8, kShort = 8;
  const int units = tiles * units_of_k;
  if (tokens <= kMostShort && units_of_k <= kShort && units_of_k % 2 == 0 && 2 * tiles <= kGrid) {
    return {2 * tiles, units_of_k / 2, 0};
  }
  for (int grid = kGrid; grid >= kLeastGrid && tokens <= kMostAligned; --grid) {
    if (tiles % grid == 0) return {grid, units / grid, 0};
    const int pieces = grid % tiles == 0 ? grid / tiles : 0;
    if (pieces > 0 && (units_of_k % pieces == 0 || (tokens >= kLeastUneven && pieces <= units_of_k))) {
      return {grid, units / grid, 0, pieces, units_of_k};
    }
  }
  return {kGrid, units / kGrid, units % kGrid};
}

struct WidePlan {
  int units_of_k;        // of a tile
  int tile_tokens;       // that a tile has: a multiple of eight, and no more than it has room for
  int team, run_tokens;  // blocks of a team; token tiles that one block's run goes through
  int pieces;            // of a tile
  int base, rem;         // pieces of team t: base + (t < rem)

  constexpr int teams() const { return kGrid / team; }
  constexpr int first_piece(int t) const { return base * t + (t < rem ? t : rem); }
  /// The first unit of a piece, tile after tile.
  constexpr int unit(int piece) const {
    return piece / pieces * units_of_k + piece % pieces * units_of_k / pieces;
  }
};

/// What block `cta` does; nothing, if it is in no team.
struct WideRun {
  int member;      // of its team
  int piece;       // the first
  int first, end;  // units

  constexpr WideRun(const WidePlan& w, int cta) : member(cta % w.team), piece(0), first(0), end(0) {
    const int team = cta / w.team;
    if (team >= w.teams()) return;
    piece = w.first_piece(team), first = w.unit(piece), end = w.unit(w.first_piece(team + 1));
  }
};

/// The plan for `channel_tiles` tiles of channels and M tokens in tiles with room for `tokens`, which have equally many of
/// them. If `pieces` are more than one, there must be a team for each of every tile of a team, and a unit for each.
constexpr WidePlan plan_wide(int channel_tiles, int M, int tokens, int units_of_k, int pieces) {
  const int token_tiles = (M + tokens - 1) / tokens, eights = (M + 7) / 8;
  WidePlan w{units_of_k, (eights + token_tiles - 1) / token_tiles * 8, 1, token_tiles, pieces, 0, 0};
  // A few blocks may stay without work: that costs less than weights that are read twice.
  if (token_tiles <= kGrid && kGrid % token_tiles <= 4) w.team = token_tiles, w.run_tokens = 1;
  const int64_t all = static_cast<int64_t>(channel_tiles) * w.run_tokens * pieces;
  w.base = static_cast<int>(all / w.teams()), w.rem = static_cast<int>(all % w.teams());
  return w;
}

/// Tokens that a wide tile can have room for, and what a unit of 128 channels then takes in us: its products, or what they
/// read from shared memory and the copies write there, which is more.
struct WideTile {
  int tokens;
  float unit_us;
};
constexpr WideTile kWideTiles[] = {{256, 0.540f}, {224, 0.466f}, {192, 0.374f}, {160, 0.297f},
                                    {144, 0.259f}, {128, 0.207f}, {112, 0.197f}, {96, 0.143f}, {64, 0.107f}};

/// Estimated without the launch, for e4m3 and bfloat16 alike, since a unit has 128 bytes of K: to order plans, no more. The
/// constants, and those of kWideTiles, are fitted together to times of all plans on an H200 (gpu_gemm_wide_h200.json): none is
/// what its part would take alone. But L2's is twice what fits best, and a tile's end a sixth more: in steps, which are at
/// the power limit, tiles of few tokens take longer than alone (benchmarks/README.md). In us.
constexpr float estimated_us(const WidePlan& w, int channel_tiles, int token_tiles, float unit_us) {
  constexpr float kL2Mb = 0.055f, kMemoryMb = 0.030f;        // what all blocks fetch from L2, or weights from memory
  constexpr float kTileEnd = 1.9f;                           // of a whole tile: nothing is multiplied meanwhile
  constexpr float kInPieces = 1.28f, kEightTokens = 0.234f;  // of a tile in pieces: sums given,
  constexpr float kOtherPiece = 0.99f;                       // and those of another block taken
  const int longest = w.base + (w.rem > 0);  // pieces
  const float units = static_cast<float>((longest * w.units_of_k + w.pieces - 1) / w.pieces);
  const float weights_mb = static_cast<float>(channel_tiles) * w.units_of_k * kWideBlocks * 8192 / 1e6f;
  const float fetched_mb = weights_mb * token_tiles * (1 + w.tile_tokens / (64.0f * kWideBlocks));
  const float multiplied = units * unit_us, from_memory = kMemoryMb * weights_mb;
  const float products = (multiplied > from_memory ? multiplied : from_memory) + kL2Mb * fetched_mb;
  if (w.pieces == 1) return products + longest * kTileEnd;
  return products + kInPieces + w.tile_tokens / 8 * kEightTokens + (w.pieces - 1) * kOtherPiece;
}

constexpr int wide_channel_tiles(int channel_blocks) { return (channel_blocks + kWideBlocks - 1) / kWideBlocks; }

struct WideChoice {
  int tokens;  // of a tile
  WidePlan plan;
};

/// For M tokens, channels in blocks of 64, and units of 128 bytes of K: the plan of the least estimated time.
constexpr WideChoice choose_wide(int M, int channel_blocks, int units_of_k) {
  constexpr int kMostPieces = 8;  // no shape measured was faster with more
  const int channel_tiles = wide_channel_tiles(channel_blocks);
  WideChoice best{};
  float least = 0.0f;
  for (const auto [tokens, unit_us] : kWideTiles) {
    const int token_tiles = (M + tokens - 1) / tokens;
    const WidePlan whole = plan_wide(channel_tiles, M, tokens, units_of_k, 1);
    int most = whole.base > 0 ? 1 : whole.teams() / whole.rem;  // that fit
    most = most < kMostPieces ? most : kMostPieces;
    most = most < units_of_k ? most : units_of_k;
    for (const int pieces : {1, most / 2, most}) {
      if (pieces == 0) continue;
      const WidePlan plan = plan_wide(channel_tiles, M, tokens, units_of_k, pieces);
      const float us = estimated_us(plan, channel_tiles, token_tiles, unit_us);
      if (best.tokens == 0 || us < least) best = {tokens, plan}, least = us;
    }
  }
  return best;
}

}  // namespace tpserve::cuda
