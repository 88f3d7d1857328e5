// Random numbers, and the race of the tokens that are kept. Rule 5 of sample.cu.
#pragma once

#include "sample_scratch.cuh"

namespace tpserve::cuda {

/// Four words of Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, 2011).
__device__ __forceinline__ void philox(uint64_t seed, uint64_t position, uint32_t block, uint32_t (&x)[4]) {
  x[0] = static_cast<uint32_t>(position), x[1] = static_cast<uint32_t>(position >> 32), x[2] = block, x[3] = 0;
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = 0xD2511F53ull * x[0], b = 0xCD9E8D57ull * x[2];
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ x[1] ^ key[0], static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ x[3] ^ key[1], static_cast<uint32_t>(a)};
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = next[i];
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
}

/// The token with the least e(i) / weight(i, logit), of equals the lowest id; -1 if no weight is above zero. Each thread has
/// one Philox block at a time, whose four tokens stand eight apart.
template <typename T, typename Weight>
__device__ int race(const RowView<T>& row, int size, uint64_t seed, uint64_t position, Weight weight,
                    SampleScratch& s) {
  Sum first = 0;  // complement of (score, id): the largest wins
  for (int block = threadIdx.x; block / 8 * 32 < size; block += kThreads) {
    const int begin = block / 8 * 32 + block % 8;
    float logits[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (begin + 8 * k < size) logits[k] = row[begin + 8 * k];
    }
    Sum weights[4], any = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      weights[k] = begin + 8 * k < size ? weight(begin + 8 * k, logits[k]) : 0;
      any |= weights[k];
    }
    if (any == 0) continue;
    uint32_t words[4];
    philox(seed, position, static_cast<uint32_t>(block), words);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (weights[k] == 0) continue;
      const float v = fmaf(static_cast<float>(words[k]), 0x1p-32f, 0x1p-33f);
      const float score = -log1pf(-v) / static_cast<float>(weights[k]);  // infinite at v = 1: behind all others
      const uint64_t place = static_cast<uint64_t>(__float_as_uint(score)) << 32 | static_cast<uint32_t>(begin + 8 * k);
      first = ~place > first ? ~place : first;
    }
  }
  first = block_reduce(first, Sum{0}, s.reduce64, Max{});
  return first == 0 ? -1 : static_cast<int>(static_cast<uint32_t>(~first));
}

}  // namespace tpserve::cuda
