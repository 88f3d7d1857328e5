// Which tile and which ring a product takes, by its tokens, channels and K; queues the kernel. On the host.
#pragma once

#include <type_traits>

#include "gemm_kernel.cuh"

namespace tpserve::cuda {

/// Of a block, for a whole ring (gemm_kernel.cuh). With few tokens qkv of a 70B's TP=4 shard, nine stages, has half a ring:
/// attention's blocks then start beside it and fetch their pages while it ends (benchmarks/README.md).
constexpr int whole_min_stages(int tokens) { return tokens <= 16 ? 10 : 8; }

template <typename T, int kTokens, int kBlocks, Ring kRing, int kGroup, End kEnd>
void run(GemmParams p, const T* x, int64_t K, cudaStream_t stream) {
  using S = Shape<kTokens, kBlocks, kRing, kGroup, kEnd>;
  if constexpr (kBlocks == 1) {
    p.units_of_k = p.packed_k;
    p.narrow = plan_narrow(p.channel_blocks, p.packed_k, kTokens);
    p.box_tokens = p.M;
  } else {
    p.units_of_k = p.plan.units_of_k;
    p.box_tokens = p.plan.tile_tokens;
  }
  const int blocks = kBlocks == 1 ? p.narrow.grid : kGrid;
  launch(gemm_kernel<T, S>, blocks, S::kThreads, S::kSharedBytes, stream, token_map(x, p.M, K, p.box_tokens), p);
}

/// One tile of all tokens, p.M <= kMost of them.
template <typename T, int kMost, int kGroup, End kEnd>
void dispatch_few(const GemmParams& p, const T* x, int64_t K, cudaStream_t stream) {
  static_assert(kMost == 16 || kMost == 32 || kMost == 64);
  const auto with_ring = [&](auto tokens) {
    constexpr int kTokens = decltype(tokens)::value;
    if (p.packed_base < whole_min_stages(kTokens)) return run<T, kTokens, 1, Ring::kHalf, kGroup, kEnd>(p, x, K, stream);
    run<T, kTokens, 1, Ring::kWhole, kGroup, kEnd>(p, x, K, stream);
  };
  if (p.M <= 8) return with_ring(std::integral_constant<int, 8>());
  if (kMost == 16 || p.M <= 16) return with_ring(std::integral_constant<int, 16>());
  if constexpr (kMost > 16) {
    if (kMost == 32 || p.M <= 32) return with_ring(std::integral_constant<int, 32>());
  }
  if constexpr (kMost > 32) with_ring(std::integral_constant<int, 64>());
}

template <typename T>
int wide_units_of_k(int64_t K) {
  return static_cast<int>((K * sizeof(T) + 127) / 128);
}

/// Wide tiles, of tokens that scales are one by one of.
template <typename T, End kEnd>
void run_wide(GemmParams p, const T* x, int64_t K, cudaStream_t stream) {
  const WideChoice choice = choose_wide(p.M, p.channel_blocks, wide_units_of_k<T>(K));
  p.plan = choice.plan;
  const auto with = [&](auto tokens) { run<T, decltype(tokens)::value, kWideBlocks, Ring::kWhole, 0, kEnd>(p, x, K, stream); };
  switch (choice.tokens) {
    case 64: return with(std::integral_constant<int, 64>());
    case 96: return with(std::integral_constant<int, 96>());
    case 112: return with(std::integral_constant<int, 112>());
    case 128: return with(std::integral_constant<int, 128>());
    case 144: return with(std::integral_constant<int, 144>());
    case 160: return with(std::integral_constant<int, 160>());
    case 192: return with(std::integral_constant<int, 192>());
    case 224: return with(std::integral_constant<int, 224>());
    default: return with(std::integral_constant<int, 256>());
  }
}

/// Any number of tokens.
template <typename T, int kGroup, End kEnd>
void dispatch(const GemmParams& p, const T* x, int64_t K, cudaStream_t stream) {
  if constexpr (kGroup == kSiluGroupSize) {
    static_assert(kMaxSiluGroupedTokens == 16, "the tiles that there are");
    return dispatch_few<T, 16, kGroup, kEnd>(p, x, K, stream);
  } else {
    if (p.M <= 64) return dispatch_few<T, 64, kGroup, kEnd>(p, x, K, stream);
    if (p.M <= 96) return run<T, 96, 1, Ring::kWhole, kGroup, kEnd>(p, x, K, stream);
    if constexpr (kGroup != 0) {
      static_assert(kMaxGroupedTokens == 128, "the tiles of one block of channels");
      if (p.M <= 128) return run<T, 128, 1, Ring::kWhole, kGroup, kEnd>(p, x, K, stream);
    }
    run_wide<T, kEnd>(p, x, K, stream);
  }
}

}  // namespace tpserve::cuda
