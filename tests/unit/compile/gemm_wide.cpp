// The ends of wide tiles on the host: every thread of a warp group with the sums that wgmma would give it, and the blocks of
// a tile in pieces at once.
#include "gemm_wide.cuh"

#include <functional>
#include <thread>
#include <vector>

namespace {

using namespace tpserve::cuda;

void on_threads(int count, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back([&, i] { threadIdx.x = i % 128, body(i); });
  for (std::thread& thread : threads) thread.join();
}

enum class End { kMemory, kSilu, kPeers };

template <int kTokens_, End kEnd>
struct Shape {
  static constexpr int kTokens = kTokens_, kBlocks = kWideBlocks;
  static constexpr bool kPush = kEnd == End::kPeers, kSilu = kEnd == End::kSilu;
};

/// `sums`: (pieces, 64, kTokens), the parts of the tile's first 64 channels. False if a slot is not empty in the end.
template <typename T, int kTokens, End kEnd>
bool finish(const GemmParams& p, const float* sums, int tile, int member) {
  constexpr int kVectors = kTokens / 8;
  constexpr size_t kSlot = kWideBlocks * kVectors * 128;
  const int pieces = p.plan.pieces, vectors = p.plan.tile_tokens / 8;
  const size_t next = p.plan.team * kSlot;
  struct Own {
    float sums[kTokens / 2];
  };
  std::vector<Own> own(pieces * 128);
  std::vector<float4> slots(pieces * next, float4{~0u, ~0u, ~0u, ~0u});
  on_threads(pieces * 128, [&](int index) {
    const int part = index / 128, thread = index % 128;
    const int row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
    float(&mine)[kTokens / 2] = own[index].sums;
    for (int i = 0; i < kTokens / 2; ++i) {
      const int n = row + i % 4 / 2 * 8, m = i / 4 * 8 + column + i % 2;
      mine[i] = sums[(static_cast<size_t>(part) * 64 + n) * kTokens + m];
    }
    const int from = part * vectors / pieces, to = (part + 1) * vectors / pieces;
    exchange_pieces<kTokens>(mine, slots.data() + part * next + thread, next, part, pieces, vectors, from, to);
  });
  using S = Shape<kTokens, kEnd>;
  PushEpoch epoch;
  std::vector<uint4> stage(kStageTokens * kStageStride / sizeof(uint4));
  const PeerStage by{epoch, reinterpret_cast<uint8_t*>(stage.data()), 3};
  for (int part = 0; part < pieces; ++part) {
    on_threads(128, [&](int thread) {
      float(&sums_of_thread)[kTokens / 2] = own[part * 128 + thread].sums;
      if (pieces == 1) {  // as the kernel ends it; of more, the blocks cannot shuffle at once here
        const WideRun run(p.plan, member);
        return finish_wide<T, S>(p, sums_of_thread, tile, run, slots.data() + thread, by);
      }
      const int from = part * vectors / pieces, to = (part + 1) * vectors / pieces;
      write_wide<T, S>(p, sums_of_thread, tile, member, from, to, by);
    });
  }
  for (const float4& slot : slots) {
    if (slot.x != ~0u || slot.w != ~0u) return false;
  }
  return true;
}

template <typename T, End kEnd>
bool finish(int tokens, const GemmParams& p, const float* sums, int tile, int member) {
  switch (tokens) {
    case 96: return finish<T, 96, kEnd>(p, sums, tile, member);
    case 160: return finish<T, 160, kEnd>(p, sums, tile, member);
    case 192: return finish<T, 192, kEnd>(p, sums, tile, member);
    case 256: return finish<T, 256, kEnd>(p, sums, tile, member);
    default: return false;
  }
}

}  // namespace

/// Of the team's `tile` and `member`, which has `tile_tokens` of the `tokens` that there is room for; with scales e4m3 tokens,
/// else bfloat16. With `peer` the rows go to `out` and to `peer`, as those of two ranks in a one-shot call; with `silu`, of
/// bfloat16 tokens, `out` has activations. Returns 0, or 1 if a slot is not empty.
extern "C" int finish_tile(int tokens, int tile_tokens, int pieces, int team, int tile, int member, const float* sums,
                           const float* channel_scale, const float* token_scale, const float* bias, void* out,
                           void* peer, int out_float32, int silu, int M, int N) {
  const WidePlan plan{64, tile_tokens, team, 1, pieces, 0, 0};
  const PushTarget push{{static_cast<uint8_t*>(out), static_cast<uint8_t*>(peer)}, nullptr,
                        {true, 0, 2, 0, 0, 0, static_cast<unsigned>(N / 8)}};
  const GemmParams p{channel_scale, token_scale, bias, out, nullptr, M, N, 0, plan, out_float32 != 0, push};
  const auto run = [&](auto type) {
    using T = decltype(type);
    if constexpr (sizeof(T) == 2) {
      if (silu) return finish<T, End::kSilu>(tokens, p, sums, tile, member);
    }
    return peer != nullptr ? finish<T, End::kPeers>(tokens, p, sums, tile, member)
                           : finish<T, End::kMemory>(tokens, p, sums, tile, member);
  };
  const bool good = token_scale != nullptr ? run(fp8{}) : run(bf16{});
  return good ? 0 : 1;
}
