// Runs the end of gate_up's GEMM on the host: every thread of a warp group with the sums that wgmma would give it.
#include "gemm_silu.cuh"

#include <thread>
#include <vector>

namespace {

using namespace tpserve::cuda;

template <typename T, int kTokens>
void run_group(const GemmParams& p, const float* sums, int num_tiles) {
  constexpr bool kFp8 = sizeof(T) == 1;
  const auto one = [&](int index) {
    threadIdx.x = index;
    const int row = index / 32 * 16 + index % 32 / 4, column = index % 4 * 2;
    for (int tile = 0; tile < num_tiles; ++tile) {
      float own[kTokens / 2];
      for (int i = 0; i < kTokens / 2; ++i) {
        const int n = tile * 64 + row + i % 4 / 2 * 8, m = i / 4 * 8 + column + i % 2;
        own[i] = sums[static_cast<int64_t>(n) * kTokens + m];
      }
      write_silu<kFp8, kTokens>(p, own, tile, TileScales<kFp8, kFp8, kTokens>(p, tile * 64 + index / 32 * 16, 0));
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < 128; ++i) threads.emplace_back(one, i);
  for (std::thread& thread : threads) thread.join();
}

template <typename T>
int run(const GemmParams& p, const float* sums, int tokens) {
  const int tiles = p.N / 64;
  if (tokens == 8) return run_group<T, 8>(p, sums, tiles), 0;
  if (tokens == 16) return run_group<T, 16>(p, sums, tiles), 0;
  if constexpr (sizeof(T) == 2) {
    if (tokens == 32) return run_group<T, 32>(p, sums, tiles), 0;
    if (tokens == 64) return run_group<T, 64>(p, sums, tiles), 0;
    if (tokens == 96) return run_group<T, 96>(p, sums, tiles), 0;
    if (tokens == 128) return run_group<T, 128>(p, sums, tiles), 0;
  }
  return 1;
}

}  // namespace

/// `sums`: (N, tokens). Returns 1 for a tile that there is not.
extern "C" int silu_bf16(const float* sums, int tokens, const float* bias, uint16_t* out, int M, int N) {
  return run<bf16>({nullptr, nullptr, bias, out, nullptr, M, N, 0, {}, false, {}}, sums, tokens);
}

extern "C" int silu_fp8(const float* sums, int tokens, const float* channel_scale, const float* token_scale,
                        const float* bias, uint8_t* out, float* out_scale, int M, int N) {
  const int padded = static_cast<int>(padded_tokens(M));
  return run<fp8>({channel_scale, token_scale, bias, out, out_scale, M, N, padded, {}, false, {}}, sums, tokens);
}
