// Follows the plans of products block by block on the host, with the arithmetic that the kernel and its fetching warp use:
// which units each block takes, what it fetches for them, and who adds whose partial sums.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <vector>

#include "gemm_cursor.cuh"

namespace {

using namespace tpserve::cuda;

struct Params {
  const uint8_t* weights;
  WidePlan plan;
  int channel_blocks, packed_k, packed_base, packed_rem;
  int units_of_k = 0;  // of up to 128 tokens
};

/// As packing.py deals stages.
int64_t packed_place(const Params& p, int stage) {
  const int longer = p.packed_rem * (p.packed_base + 1);
  const int block = stage < longer ? stage / (p.packed_base + 1) : p.packed_rem + (stage - longer) / p.packed_base;
  return static_cast<int64_t>(stage - p.packed_base * block - std::min(block, p.packed_rem)) * kGrid + block;
}

#define CHECK(condition)                                                                            \
  if (!(condition)) {                                                                               \
    std::snprintf(why, 200, "%s: block %d, tile %d, unit %d", #condition, cta, tile, unit); \
    return 1;                                                                                       \
  }

int follow(const Params& p, int token_tiles, char* why) {
  constexpr int kBlocks = kWideBlocks;
  const WidePlan& w = p.plan;
  const int vectors = w.tile_tokens / 8, units = w.units_of_k, channel_tiles = (p.channel_blocks + kBlocks - 1) / kBlocks;
  int cta = -1, tile = -1, unit = -1;
  CHECK(w.team * w.run_tokens == token_tiles && (w.team == 1 || w.run_tokens == 1));
  std::vector<uint8_t> taken(static_cast<size_t>(channel_tiles) * token_tiles * units);
  std::vector<int> finished(static_cast<size_t>(channel_tiles) * token_tiles);  // of a tile: vectors of eight tokens
  int longest = 0, shortest = 1 << 30;  // runs
  for (cta = 0; cta < kGrid; ++cta) {
    const WideRun run(w, cta);
    if (cta / w.team < w.teams() && (w.pieces == 1 || run.first < run.end)) {
      longest = std::max(longest, run.end - run.first), shortest = std::min(shortest, run.end - run.first);
    }
    WideUnits fetch(p, run);
    WideWeights weights[kBlocks]{};
    const auto begin_tile = [&] {
      for (int i = 0; i < kBlocks && fetch.block + i < p.channel_blocks; ++i) weights[i].start(p, fetch.block + i, fetch.k);
    };
    if (run.first < run.end) begin_tile();
    for (unit = run.first, tile = run.first / units; unit < run.end; ++tile) {
      const int tile_end = (tile + 1) * units, stop = std::min(run.end, tile_end);
      const int channel = tile / w.run_tokens * kBlocks, token_tile = tile % w.run_tokens + run.member;
      const size_t whole_tile = static_cast<size_t>(channel / kBlocks) * token_tiles + token_tile;
      CHECK(channel / kBlocks < channel_tiles && token_tile < token_tiles);
      for (; unit < stop; ++unit) {
        CHECK(fetch.block == channel && fetch.token == token_tile * w.tile_tokens && fetch.k == unit - tile * units);
        uint8_t& once = taken[whole_tile * units + fetch.k];
        CHECK(once++ == 0);
        for (int i = 0; i < kBlocks && fetch.block + i < p.channel_blocks; ++i) {
          const int stage = (fetch.block + i) * p.packed_k + fetch.k / 2;
          const int64_t place = packed_place(p, stage);
          CHECK(weights[i].source - p.weights == place * kStageBytes + fetch.k % 2 * kTileBytes);
        }
        if (!fetch.advance(p)) {
          for (WideWeights& of_block : weights) of_block.advance(p);
        } else if (unit + 1 < run.end) {
          begin_tile();
        }
      }
      if (w.pieces == 1) {
        CHECK(stop == tile_end);
        finished[whole_tile] += vectors;
        continue;
      }
      const int part = run.piece % w.pieces, first = cta - part * w.team;
      CHECK(stop == run.end && first >= 0 && first + (w.pieces - 1) * w.team < kGrid);
      for (int other = 0; other < w.pieces; ++other) {  // whose sums this block reads are of the same tile, in order
        const WideRun theirs(w, first + other * w.team);
        CHECK(theirs.piece == tile * w.pieces + other && theirs.member == run.member && theirs.first < theirs.end);
      }
      finished[whole_tile] += (part + 1) * vectors / w.pieces - part * vectors / w.pieces;
    }
  }
  cta = -1, unit = -1;
  for (tile = 0; tile < channel_tiles * token_tiles; ++tile) CHECK(finished[tile] == vectors);
  for (size_t at = 0; at < taken.size(); ++at) {
    unit = static_cast<int>(at);
    CHECK(taken[at] == 1);
  }
  CHECK(longest - shortest <= (w.pieces == 1 ? units : 1));
  return 0;
}

Params params_of(int channel_blocks, int64_t row_bytes, const WidePlan& plan) {
  const int packed_k = static_cast<int>((row_bytes + 255) / 256), stages = channel_blocks * packed_k;
  return {nullptr, plan, channel_blocks, packed_k, stages / kGrid, stages % kGrid};
}

}  // namespace

/// The plan that the library chooses, written to `chosen` (tokens, tile_tokens, team, run_tokens, pieces, base, rem), and
/// followed.
/// Returns 0, or 1 with the condition that does not hold.
extern "C" int follow_chosen(int M, int channel_blocks, int64_t row_bytes, int* chosen, char* why) {
  const int units = static_cast<int>((row_bytes + 127) / 128);
  const WideChoice c = choose_wide(M, channel_blocks, units);
  const WidePlan& w = c.plan;
  const int values[] = {c.tokens, w.tile_tokens, w.team, w.run_tokens, w.pieces, w.base, w.rem};
  std::copy(std::begin(values), std::end(values), chosen);
  return follow(params_of(channel_blocks, row_bytes, w), (M + c.tokens - 1) / c.tokens, why);
}

/// Of a plan of whole tiles: the pieces that a tile can be cut into.
extern "C" int most_pieces(int M, int channel_blocks, int64_t row_bytes, int tokens) {
  const int units = static_cast<int>((row_bytes + 127) / 128);
  const WidePlan w = plan_wide(wide_channel_tiles(channel_blocks), M, tokens, units, 1);
  return w.base > 0 ? 1 : std::min(w.teams() / w.rem, units);
}

/// Any plan.
extern "C" int follow_plan(int M, int channel_blocks, int64_t row_bytes, int tokens, int pieces, char* why) {
  const int units = static_cast<int>((row_bytes + 127) / 128), token_tiles = (M + tokens - 1) / tokens;
  const WidePlan w = plan_wide(wide_channel_tiles(channel_blocks), M, tokens, units, pieces);
  return follow(params_of(channel_blocks, row_bytes, w), token_tiles, why);
}

/// The plan for up to 128 tokens, written to `plan` (grid, base, rem) and followed; then the most blocks that a tile has.
extern "C" int follow_narrow(int tokens, int channel_blocks, int64_t row_bytes, int* values, char* why) {
  const int units = static_cast<int>((row_bytes + 255) / 256);
  const NarrowPlan plan = plan_narrow(channel_blocks, units, tokens);
  Params p = params_of(channel_blocks, row_bytes, {});
  p.units_of_k = units;
  int cta = -1, tile = -1, unit = -1;
  CHECK(plan.grid <= kGrid);
  std::vector<int> taken(static_cast<size_t>(channel_blocks) * units), blocks(channel_blocks);
  for (cta = 0; cta < plan.grid; ++cta) {
    const NarrowRun run{plan.first(cta), plan.first(cta + 1)};
    NarrowUnits fetch(p, run);
    WeightCursor weights{};
    if (run.first < run.end) weights.start(p, run.first);
    for (unit = run.first; unit < run.end; ++unit) {
      tile = unit / units;
      CHECK(tile < channel_blocks && taken[unit]++ == 0 && fetch.k == unit % units);
      CHECK(weights.address(p, 0) - p.weights == packed_place(p, unit) * kStageBytes);
      if (unit == run.first || fetch.k == 0) ++blocks[tile];
      fetch.advance(p), weights.advance(p);
    }
  }
  cta = -1;
  for (unit = 0; unit < static_cast<int>(taken.size()); ++unit) CHECK(taken[unit] == 1);
  values[0] = plan.grid, values[1] = plan.base, values[2] = plan.rem;
  values[3] = *std::max_element(blocks.begin(), blocks.end());
  return 0;
}
