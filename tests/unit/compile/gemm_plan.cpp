// Follows the plans of wide products block by block on the host, with the arithmetic that the kernel and its fetching warp
// use: which units each block takes, what it fetches for them, and who adds whose partial sums.
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
};

#define CHECK(condition)                                                                            \
  if (!(condition)) {                                                                               \
    std::snprintf(why, 200, "%s: block %d, tile %d, unit %d", #condition, cta, tile, unit); \
    return 1;                                                                                       \
  }

template <int kTokens, int kBlocks>
int follow(const Params& p, int token_tiles, char* why) {
  const WidePlan& w = p.plan;
  const int units = w.units_of_k, channel_tiles = (p.channel_blocks + kBlocks - 1) / kBlocks;
  int cta = -1, tile = -1, unit = -1;
  CHECK(w.team * w.run_tokens == token_tiles && (w.team == 1 || w.run_tokens == 1));
  std::vector<uint8_t> taken(static_cast<size_t>(channel_tiles) * token_tiles * units);
  // Blocks whose sums of a part of a tile lie in their slots, and those that were added; by block.
  std::vector<int> stored_tile(kGrid, -1), added(kGrid);
  struct Reader {
    int cta, tile, sharers;
  };
  std::vector<Reader> readers;
  std::vector<int> parts(static_cast<size_t>(channel_tiles) * token_tiles);  // of a sliced tile: blocks that finish some
  int longest = 0, shortest = 1 << 30;
  for (cta = 0; cta < kGrid; ++cta) {
    const WideRun run(w, cta);
    if (cta / w.team < w.teams()) {
      longest = std::max(longest, run.end - run.first), shortest = std::min(shortest, run.end - run.first);
    }
    UnitCursor<kTokens, kBlocks> fetch(p, run);
    for (unit = run.first, tile = run.first / units; unit < run.end; ++tile) {
      const bool started_here = unit == tile * units;
      const int tile_end = (tile + 1) * units, stop = std::min(run.end, tile_end);
      const int channel = tile / w.run_tokens * kBlocks, token_tile = tile % w.run_tokens + run.member;
      const size_t whole_tile = static_cast<size_t>(channel / kBlocks) * token_tiles + token_tile;
      CHECK(channel / kBlocks < channel_tiles && token_tile < token_tiles);
      std::vector<bool> of_k(units);
      for (; unit < stop; ++unit) {
        CHECK(fetch.block == channel && fetch.token == token_tile * kTokens);
        CHECK(fetch.k >= 0 && fetch.k < units && !of_k[fetch.k]);
        if (w.first_k(run.team) == 0) CHECK(fetch.k == unit - tile * units);
        of_k[fetch.k] = true;
        uint8_t& once = taken[whole_tile * units + fetch.k];
        CHECK(once++ == 0);
        for (int i = 0; i < kBlocks && fetch.block + i < p.channel_blocks; ++i) {
          // As packing.py deals stages.
          const int stage = (fetch.block + i) * p.packed_k + fetch.k / 2, longer = p.packed_rem * (p.packed_base + 1);
          const int block = stage < longer ? stage / (p.packed_base + 1) : p.packed_rem + (stage - longer) / p.packed_base;
          const int begin = p.packed_base * block + std::min(block, p.packed_rem);
          const int64_t place = static_cast<int64_t>(stage - begin) * kGrid + block;
          CHECK(fetch.weights[i].address(p, fetch.k % 2) - p.weights == place * kStageBytes + fetch.k % 2 * kTileBytes);
        }
        fetch.advance(p);
      }
      if (w.sliced) {
        const int part = run.piece % w.pieces, first = cta - part * w.team;
        CHECK(run.pieces_end == run.piece + 1 && first >= 0 && first + (w.pieces - 1) * w.team < kGrid);
        for (int other = 0; other < w.pieces; ++other) {  // whose sums this block reads are of the same tile, in order
          const WideRun theirs(w, first + other * w.team);
          CHECK(theirs.piece == tile * w.pieces + other && theirs.member == run.member && theirs.first < theirs.end);
        }
        const int from = part * (kTokens / 8) / w.pieces, to = (part + 1) * (kTokens / 8) / w.pieces;
        parts[whole_tile] += to - from;
      } else if (!started_here) {
        CHECK(stored_tile[cta] == -1);
        stored_tile[cta] = static_cast<int>(whole_tile);
      } else {
        parts[whole_tile] += kTokens / 8;
        if (stop < tile_end) readers.push_back({cta, static_cast<int>(whole_tile), run.sharers(w, tile)});
      }
    }
  }
  unit = -1;
  for (const Reader& reader : readers) {
    tile = reader.tile;
    CHECK(reader.sharers > 0);
    for (int i = 1; i <= reader.sharers; ++i) {
      cta = reader.cta + i * w.team;
      CHECK(cta < kGrid && stored_tile[cta] == reader.tile && added[cta]++ == 0);
    }
  }
  for (cta = 0; cta < kGrid; ++cta) CHECK((stored_tile[cta] != -1) == (added[cta] == 1));
  cta = -1;
  for (tile = 0; tile < channel_tiles * token_tiles; ++tile) CHECK(parts[tile] == kTokens / 8);
  for (size_t at = 0; at < taken.size(); ++at) {
    unit = static_cast<int>(at);
    CHECK(taken[at] == 1);
  }
  if (w.pieces == units) CHECK(longest - shortest <= 1);
  return 0;
}

int follow(int tokens, int blocks, const Params& p, int token_tiles, char* why) {
  switch (blocks * 1000 + tokens) {
    case 2096: return follow<96, 2>(p, token_tiles, why);
    case 2128: return follow<128, 2>(p, token_tiles, why);
    case 2160: return follow<160, 2>(p, token_tiles, why);
    case 2192: return follow<192, 2>(p, token_tiles, why);
    case 2256: return follow<256, 2>(p, token_tiles, why);
    case 3192: return follow<192, 3>(p, token_tiles, why);
    case 3256: return follow<256, 3>(p, token_tiles, why);
    default: std::snprintf(why, 200, "there is no tile of %d x %d", tokens, blocks); return 1;
  }
}

Params params_of(int channel_blocks, int64_t row_bytes, const WidePlan& plan) {
  const int packed_k = static_cast<int>((row_bytes + 255) / 256), stages = channel_blocks * packed_k;
  return {nullptr, plan, channel_blocks, packed_k, stages / kGrid, stages % kGrid};
}

}  // namespace

/// The plan that the library would choose, written to `chosen` (tokens, blocks, team, run_tokens, pieces, base, rem, sliced,
/// rotated), and followed. Returns 0, or 1 with the condition that does not hold.
extern "C" int follow_chosen(int M, int channel_blocks, int64_t row_bytes, unsigned features, int* chosen, float* us,
                             char* why) {
  const int units = static_cast<int>((row_bytes + 127) / 128);
  const WideChoice c = choose_wide(M, channel_blocks, units, features);
  const WidePlan& w = c.plan;
  const int values[] = {c.tokens, c.blocks, w.team, w.run_tokens, w.pieces, w.base, w.rem, w.sliced, w.rotated};
  std::copy(std::begin(values), std::end(values), chosen);
  *us = c.us;
  return follow(c.tokens, c.blocks, params_of(channel_blocks, row_bytes, w), (M + c.tokens - 1) / c.tokens, why);
}

/// Any plan.
extern "C" int follow_plan(int M, int channel_blocks, int64_t row_bytes, int tokens, int blocks, int pieces,
                           unsigned features, char* why) {
  const int units = static_cast<int>((row_bytes + 127) / 128), token_tiles = (M + tokens - 1) / tokens;
  const WidePlan w = plan_wide((channel_blocks + blocks - 1) / blocks, token_tiles, units, pieces, features);
  return follow(tokens, blocks, params_of(channel_blocks, row_bytes, w), token_tiles, why);
}
