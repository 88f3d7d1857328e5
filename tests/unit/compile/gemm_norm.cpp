// Runs on the host what a norm between two GEMMs is without a kernel: every thread of a warp group, with the sums that
// wgmma would give it.
#include "gemm_norm.cuh"

#include <thread>
#include <vector>

namespace {

using namespace tpserve::cuda;

struct Params {
  const float *channel_scale, *bias;
  void* out;
  int M, N;
  const bf16* residual;
  const float* norm_weight;
  float eps;
  bf16* residual_out;
  float *squares_out, *out_scale;
};

template <typename Run>
void run_group(const Run& run) {
  std::vector<std::thread> threads;
  for (int i = 0; i < 128; ++i) {
    threads.emplace_back([&run, i] {
      threadIdx.x = i;
      run(i);
    });
  }
  for (std::thread& thread : threads) thread.join();
}

/// This thread's sums of a tile; channels that are not there are 0, as packed weights are.
template <int kTokens>
void take_sums(float (&own)[kTokens / 2], const float* sums, int tile, int N) {
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, column = threadIdx.x % 4 * 2;
  for (int i = 0; i < kTokens / 2; ++i) {
    const int n = tile * 64 + row + i % 4 / 2 * 8, m = i / 4 * 8 + column + i % 2;
    own[i] = n < N ? sums[static_cast<int64_t>(n) * kTokens + m] : 0.0f;
  }
}

template <bool kFp8, int kTokens>
int begin(const Params& p, const float* sums) {
  run_group([&](int index) {
    for (int tile = 0; tile * 64 < p.N; ++tile) {
      const int channel = tile * 64 + index / 32 * 16;
      float own[kTokens / 2];
      take_sums<kTokens>(own, sums, tile, p.N);
      write_residual<kFp8, kTokens>(p, own, tile, TileScales<false, false, kTokens>(p, channel, 0),
                                    ResidualRows<kTokens>(p, channel, true));
    }
  });
  return 0;
}

template <int kTokens>
int end(const float* squares, int tokens, int size, const float* sums, const float* bias, int N, float* out) {
  static float parts[128], factors[kTokens];
  const Params p{nullptr, bias, out, tokens, N, nullptr, nullptr, 0.0f, nullptr, nullptr, nullptr};
  run_group([&](int index) {
    add_squares<kTokens>(squares, tokens, size, parts, factors);
    for (int tile = 0; tile * 64 < N; ++tile) {
      const int row = index / 32 * 16 + index % 32 / 4, column = index % 4 * 2;
      float own[kTokens / 2];
      take_sums<kTokens>(own, sums, tile, N);
      const NormedScales<false, kTokens> scales(p, tile * 64 + index / 32 * 16, factors);
      for (int b = 0; b < kTokens / 8; ++b) {
        float values[4];
        scales.apply(own, b, values);
        for (int j = 0; j < 4; ++j) {
          const int n = tile * 64 + row + j / 2 * 8, m = b * 8 + column + j % 2;
          if (m < tokens && n < N) out[static_cast<int64_t>(m) * N + n] = values[j];
        }
      }
    }
  });
  return 0;
}

}  // namespace

/// `sums`: (N, kTokens). Returns 1 for a tile that there is not.
extern "C" int begin_norm(int kTokens, const float* sums, int M, int N, const float* bias, const uint16_t* residual,
                          const float* norm_weight, float eps, uint16_t* residual_out, uint16_t* out, float* squares) {
  const Params p{nullptr, bias, out, M, N, residual, norm_weight, eps, residual_out, squares, nullptr};
  if (kTokens == 8) return begin<false, 8>(p, sums);
  if (kTokens == 16) return begin<false, 16>(p, sums);
  return kTokens == 32 ? begin<false, 32>(p, sums) : 1;
}

/// The same, its norm in e4m3, with a scale for each tile and token.
extern "C" int begin_norm_fp8(int kTokens, const float* sums, int M, int N, const float* bias, const uint16_t* residual,
                              const float* norm_weight, float eps, uint16_t* residual_out, uint8_t* out, float* scales,
                              float* squares) {
  const Params p{nullptr, bias, out, M, N, residual, norm_weight, eps, residual_out, squares, scales};
  if (kTokens == 8) return begin<true, 8>(p, sums);
  return kTokens == 16 ? begin<true, 16>(p, sums) : 1;
}

/// `out`: (M, N) float32, what the product gives before it is stored.
extern "C" int end_norm(int kTokens, const float* squares, int M, int size, const float* sums, const float* bias, int N,
                        float* out) {
  if (kTokens == 8) return end<8>(squares, M, size, sums, bias, N, out);
  if (kTokens == 16) return end<16>(squares, M, size, sums, bias, N, out);
  return kTokens == 32 ? end<32>(squares, M, size, sums, bias, N, out) : 1;
}
