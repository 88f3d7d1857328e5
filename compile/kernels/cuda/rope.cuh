// What one thread does with its part of a new token's head: norm, rotation, and what pages store of it. The kernel that
// appends any tokens (rope.cu) and the one that appends a decode's on the way (attention_fetch.cuh) share it, so both
// give the same bits; sums of products are spelt out, for the compiler fuses others as it likes.
//
// The rotation is Hugging Face's `rotate_half`: dimension i pairs with i + head_dim / 2 (Su et al., RoFormer, eq. 34,
// with the pairs laid out in halves). With norm weights each head of q and k is first RMS-normalised (Qwen3).
// A thread owns eight dimensions of the first half of a head, from d, and their partners. On e4m3 pages values are
// divided by their layer's scale, rounded to nearest even and clipped to +-448; NaN stays NaN.
#pragma once

#include <type_traits>

#include "kv.cuh"

namespace tpserve::cuda {

/// What a layer's projections give for a step's tokens, and what turns them.
struct NewTokens {
  const bf16* qkv;  // (T, Hq + 2 Hkv, D)
  const float* q_weight;  // (D,) each; null without norm
  const float* k_weight;
  const float* rope;  // (max_model_len, D): cosines, then sines
  float eps;
};

enum class HeadKind { kQuery, kKey, kValue };

/// Two times eight float32: of a thread's dimensions and of their partners. What is loaded is a parameter, which no kernel
/// writes.
struct Floats {
  float first[8], second[8];

  template <int kHeadDim>
  __device__ __forceinline__ void load(const float* p) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const float4 a = __ldg(reinterpret_cast<const float4*>(p) + i);
      const float4 b = __ldg(reinterpret_cast<const float4*>(p + kHeadDim / 2) + i);
      first[i * 4] = a.x, first[i * 4 + 1] = a.y, first[i * 4 + 2] = a.z, first[i * 4 + 3] = a.w;
      second[i * 4] = b.x, second[i * 4 + 1] = b.y, second[i * 4 + 2] = b.z, second[i * 4 + 3] = b.w;
    }
  }
};

/// Two times eight bfloat16.
struct HeadPart {
  uint4 first, second;

  template <int kHeadDim>
  __device__ __forceinline__ void load(const bf16* p) {
    first = load_l2(p), second = load_l2(p + kHeadDim / 2);
  }

  template <int kHeadDim>
  __device__ __forceinline__ void store(bf16* p) const {
    *reinterpret_cast<uint4*>(p) = first;
    *reinterpret_cast<uint4*>(p + kHeadDim / 2) = second;
  }
};

/// A dimension and its partner, turned by an angle.
__device__ __forceinline__ float turned_first(float x, float y, float cosine, float sine) {
  return __fmaf_rn(x, cosine, -__fmul_rn(y, sine));
}
__device__ __forceinline__ float turned_second(float x, float y, float cosine, float sine) {
  return __fmaf_rn(y, cosine, __fmul_rn(x, sine));
}

/// Of two dimensions and of their partners.
__device__ __forceinline__ float pair_squares(float x0, float x1, float y0, float y1) {
  return __fmaf_rn(y1, y1, __fmaf_rn(y0, y0, __fmaf_rn(x1, x1, __fmul_rn(x0, x0))));
}

/// Normalises, where there is a norm, and turns queries and keys; returns the same in float32. Values stay as they are.
/// All lanes of the warp take part: those of a head, which follow each other, add up its squares.
template <int kHeadDim>
__device__ __forceinline__ Floats turn(HeadPart& part, HeadKind kind, const Floats& angles, const Floats& weight,
                                       bool has_norm, float eps) {
  Floats f;
  unpack8(part.first, f.first), unpack8(part.second, f.second);
  float factor = 1.0f;
  if (has_norm) {
    float squares[4];  // of two dimensions and their partners
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      squares[j] = pair_squares(f.first[j * 2], f.first[j * 2 + 1], f.second[j * 2], f.second[j * 2 + 1]);
#pragma unroll
      for (int offset = kHeadDim / 32; offset > 0; offset /= 2) squares[j] += __shfl_xor_sync(~0u, squares[j], offset);
    }
    const float sum = (squares[0] + squares[1]) + (squares[2] + squares[3]);
    factor = rsqrtf(__fmaf_rn(sum, 1.0f / kHeadDim, eps));
  }
  if (kind == HeadKind::kValue) return f;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    float x = f.first[i], y = f.second[i];
    if (has_norm) x *= factor * weight.first[i], y *= factor * weight.second[i];
    f.first[i] = turned_first(x, y, angles.first[i], angles.second[i]);
    f.second[i] = turned_second(x, y, angles.first[i], angles.second[i]);
  }
  part.first = pack8(f.first), part.second = pack8(f.second);
  return f;
}

/// What keys or values are multiplied by before pages of type KV store them.
template <typename KV>
__device__ __forceinline__ float stored_scale(const PagedKV<KV>& kv, HeadKind kind) {
  if constexpr (std::is_same_v<KV, fp8>) return 1.0f / __ldg(kv.scales + (kind == HeadKind::kValue ? 1 : 0));
  return 1.0f;
}

/// A part of a key or value as pages of type KV store it.
template <typename KV>
struct StoredPart {
  using Chunk = std::conditional_t<std::is_same_v<KV, fp8>, uint2, uint4>;
  Chunk first, second;

  /// All lanes of the warp take part, whatever they have: of a chunk of e4m3, sixteen dimensions, the lane before has
  /// the lower ones, if d is among the upper.
  __device__ __forceinline__ StoredPart(const HeadPart& part, const Floats& floats, float scale, HeadKind kind, int d) {
    if constexpr (std::is_same_v<KV, fp8>) {
      const bool is_value = kind == HeadKind::kValue, upper = d % 16 != 0;
      first = quantize8(floats.first, scale, upper, is_value);
      second = quantize8(floats.second, scale, upper, is_value);
    } else {
      first = part.first, second = part.second;
    }
  }

  template <int kHeadDim>
  __device__ __forceinline__ void store(const PagedKV<KV>& kv, int page, int row, int head, HeadKind kind, int d) const {
    using P = Panels<sizeof(KV), kHeadDim>;
    KV* target = kv.template keys<kHeadDim>(page, head) + (kind == HeadKind::kValue ? kv.page_size * kHeadDim : 0);
    if (std::is_same_v<KV, fp8> && d % 16 != 0) target += 8;
    __stcg(reinterpret_cast<Chunk*>(target + P::chunk_at(kv.page_size, row, d)), first);
    __stcg(reinterpret_cast<Chunk*>(target + P::chunk_at(kv.page_size, row, d + kHeadDim / 2)), second);
  }

 private:
  static __device__ __forceinline__ uint2 quantize8(const float (&f)[8], float scale, bool upper, bool is_value) {
    float g[8];
#pragma unroll
    for (int i = 0; i < 8; ++i) g[i] = f[i] * scale;
    const uint32_t words[2] = {pack4_fp8(g[0], g[1], g[2], g[3]), pack4_fp8(g[4], g[5], g[6], g[7])};
    const uint32_t partners = __shfl_xor_sync(~0u, word_for_partner(words, upper), 1);
    uint32_t stored[2];
    arrange_half(words, partners, upper, is_value, stored);
    return make_uint2(stored[0], stored[1]);
  }
};

/// What `append` takes besides.
template <typename KV>
struct AppendParams {
  NewTokens added;
  PagedKV<KV> kv;
  const int32_t* positions;  // (T,)
  const int32_t* slots;
  bf16* q;  // (T, Hq, D): queries, turned
  int num_tokens, num_heads;
  bool is_planned;  // by a plan of the step, which has ended before any kernel after it started (plan_kernel)
};

/// Queues the turning of a step's queries and the append of its keys and values, in pages of bf16 or fp8; tokens with slot
/// -1 append nothing.
template <typename KV>
void append(const AppendParams<KV>& p, int64_t head_dim, cudaStream_t stream);

}  // namespace tpserve::cuda
