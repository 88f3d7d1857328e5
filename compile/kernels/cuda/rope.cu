// Rotary embedding of queries and keys, and the append of keys and values to their pages.
//
// The rotation is Hugging Face's `rotate_half`: dimension i pairs with i + head_dim / 2 (Su et al., RoFormer, eq. 34,
// with the pairs laid out in halves). With norm weights each head of q and k is first RMS-normalised (Qwen3).
// A thread owns eight dimensions of the first half of a head and their partners. On e4m3 pages values are divided by
// their layer's scale, rounded to nearest even and clipped to +-448; NaN stays NaN.
#include <type_traits>

#include "kv.cuh"

namespace tpserve::cuda {
namespace {

constexpr int kThreads = 128;

template <typename KV>
struct RopeParams {
  const bf16* qkv;
  const float* q_weight;  // null without norm
  const float* k_weight;
  const int32_t* positions;
  const int32_t* slots;
  const float* rope;  // (max_model_len, head_dim): cosines, then sines
  bf16* q_out;
  PagedKV<KV> kv;
  int num_heads;
  float eps;
};

__device__ __forceinline__ void load8(const float* p, float (&f)[8]) {
  const float4 a = __ldg(reinterpret_cast<const float4*>(p)), b = __ldg(reinterpret_cast<const float4*>(p) + 1);
  f[0] = a.x, f[1] = a.y, f[2] = a.z, f[3] = a.w, f[4] = b.x, f[5] = b.y, f[6] = b.z, f[7] = b.w;
}

/// Eight dimensions of a head as e4m3 pages store them; all lanes of the warp take part. `upper`: of a chunk's sixteen
/// dimensions the thread has the upper ones, the lane before it the others.
__device__ __forceinline__ uint2 quantize8(const float (&f)[8], float inverse_scale, bool upper, bool is_value) {
  float g[8];
#pragma unroll
  for (int i = 0; i < 8; ++i) g[i] = f[i] * inverse_scale;
  const uint32_t words[2] = {pack4_fp8(g[0], g[1], g[2], g[3]), pack4_fp8(g[4], g[5], g[6], g[7])};
  const uint32_t partners = __shfl_xor_sync(~0u, word_for_partner(words, upper), 1);
  uint32_t stored[2];
  arrange_half(words, partners, upper, is_value, stored);
  return make_uint2(stored[0], stored[1]);
}

template <typename KV, int kHeadDim, bool kNorm>
__global__ void __launch_bounds__(kThreads) rope_kernel(const __grid_constant__ RopeParams<KV> p) {
  constexpr int kLanes = kHeadDim / 16, kHalf = kHeadDim / 2;  // threads per head
  pdl_launch();
  pdl_wait();
  const int64_t token = blockIdx.y;
  const int unit = blockIdx.x * kThreads + threadIdx.x;
  const int head = unit / kLanes, d = unit % kLanes * 8;
  const int num_kv = p.kv.num_kv_heads, all_heads = p.num_heads + 2 * num_kv;
  if (head - head % (32 / kLanes) >= all_heads) return;  // whole warps only: the norm shuffles
  const bool present = head < all_heads;
  const int slot = __ldcg(p.slots + token), position = __ldcg(p.positions + token);
  uint4 first{}, second{};
  if (present) {
    const bf16* source = p.qkv + (token * all_heads + head) * kHeadDim + d;
    first = load_l2(source), second = load_l2(source + kHalf);
  }
  const bool is_query = head < p.num_heads, is_value = head >= p.num_heads + num_kv;
  float a[8], b[8];
  if (kNorm || !is_value) {
    float cosines[8], sines[8];
    unpack8(first, a), unpack8(second, b);
    if constexpr (kNorm) {
      float squares = 0.0f;
#pragma unroll
      for (int i = 0; i < 8; ++i) squares += a[i] * a[i] + b[i] * b[i];
#pragma unroll
      for (int offset = kLanes / 2; offset > 0; offset /= 2) squares += __shfl_xor_sync(~0u, squares, offset);
      const float factor = rsqrtf(squares / kHeadDim + p.eps);
      const float* weight = is_query ? p.q_weight : p.k_weight;
      float wa[8], wb[8];
      load8(weight + d, wa), load8(weight + kHalf + d, wb);
#pragma unroll
      for (int i = 0; i < 8; ++i) a[i] *= factor * wa[i], b[i] *= factor * wb[i];
    }
    if (!is_value) {
      const float* angles = p.rope + static_cast<int64_t>(slot < 0 ? 0 : position) * kHeadDim + d;
      load8(angles, cosines), load8(angles + kHalf, sines);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float x = a[i], y = b[i];
        a[i] = x * cosines[i] - y * sines[i];
        b[i] = y * cosines[i] + x * sines[i];
      }
      first = pack8(a), second = pack8(b);
    }
  }
  [[maybe_unused]] const bool upper = threadIdx.x % 2 != 0;
  [[maybe_unused]] uint2 codes[2];
  if constexpr (std::is_same_v<KV, fp8>) {  // before lanes leave
    if (is_value) unpack8(first, a), unpack8(second, b);
    const float inverse_scale = 1.0f / __ldg(p.kv.scales + (is_value ? 1 : 0));
    codes[0] = quantize8(a, inverse_scale, upper, is_value);
    codes[1] = quantize8(b, inverse_scale, upper, is_value);
  }
  if (!present) return;
  if (is_query) {
    bf16* target = p.q_out + (token * p.num_heads + head) * kHeadDim + d;
    *reinterpret_cast<uint4*>(target) = first;
    *reinterpret_cast<uint4*>(target + kHalf) = second;
    return;
  }
  if (slot < 0) return;
  const int page = __ldcg(p.kv.table + static_cast<int64_t>(slot) * p.kv.pages_per_slot + position / p.kv.page_size);
  const int row = position % p.kv.page_size;
  KV* target = p.kv.template keys<kHeadDim>(page, (head - p.num_heads) % num_kv) +
               (is_value ? p.kv.page_size * kHeadDim : 0);
  using P = Panels<sizeof(KV), kHeadDim>;
  if constexpr (std::is_same_v<KV, fp8>) {
    target += upper ? 8 : 0;
    *reinterpret_cast<uint2*>(target + P::chunk_at(p.kv.page_size, row, d)) = codes[0];
    *reinterpret_cast<uint2*>(target + P::chunk_at(p.kv.page_size, row, d + kHalf)) = codes[1];
  } else {
    *reinterpret_cast<uint4*>(target + P::chunk_at(p.kv.page_size, row, d)) = first;
    *reinterpret_cast<uint4*>(target + P::chunk_at(p.kv.page_size, row, d + kHalf)) = second;
  }
}

/// Norm weights of q and k with their epsilon, or none.
struct HeadNorm {
  const TensorView* q_weight = nullptr;
  const TensorView* k_weight = nullptr;
  double eps = 0.0;
};

template <typename KV>
void append(const TensorView& qkv, HeadNorm norm, const TensorView& positions, const TensorView& token_slots,
            const TensorView& page_table, const TensorView& rope, KVScales<KV> scales, const TensorView& kv_layer,
            const TensorView& q_out) {
  check_rank("q_out", q_out, 3);
  const int64_t num_tokens = q_out.size(0), num_heads = q_out.size(1), dim = q_out.size(2);
  RopeParams<KV> p{};
  p.kv = PagedKV<KV>::from(scales, kv_layer, page_table, dim);
  const int64_t all_heads = num_heads + 2 * p.kv.num_kv_heads;
  p.qkv = checked<bf16>("qkv", qkv, {num_tokens, all_heads * dim});
  p.positions = checked<int32_t>("positions", positions, {num_tokens});
  p.slots = checked<int32_t>("token_slots", token_slots, {num_tokens});
  p.rope = checked<float>("rope", rope, {-1, dim});
  p.q_out = checked<bf16>("q_out", q_out, {num_tokens, num_heads, dim});
  p.num_heads = static_cast<int>(num_heads);
  p.eps = static_cast<float>(norm.eps);
  const bool has_norm = norm.q_weight != nullptr;
  if (has_norm) {
    p.q_weight = checked<float>("q_weight", *norm.q_weight, {dim});
    p.k_weight = checked<float>("k_weight", *norm.k_weight, {dim});
  }
  const int64_t units = all_heads * (dim / 16);
  const dim3 grid(static_cast<unsigned>((units + kThreads - 1) / kThreads), static_cast<unsigned>(num_tokens));
  const auto kernel = dim == 128 ? (has_norm ? rope_kernel<KV, 128, true> : rope_kernel<KV, 128, false>)
                                 : (has_norm ? rope_kernel<KV, 64, true> : rope_kernel<KV, 64, false>);
  launch(kernel, grid, kThreads, 0, stream_of(q_out), p);
}

/// As the CPU's `rope_append`, in bfloat16; tokens with slot -1 append nothing.
void rope_append(TensorView qkv, TensorView positions, TensorView token_slots, TensorView page_table, TensorView rope,
                 TensorView kv_layer, TensorView q_out) {
  append<bf16>(qkv, {}, positions, token_slots, page_table, rope, {}, kv_layer, q_out);
}

void qk_norm_rope_append(TensorView qkv, TensorView q_weight, TensorView k_weight, double eps, TensorView positions,
                         TensorView token_slots, TensorView page_table, TensorView rope, TensorView kv_layer,
                         TensorView q_out) {
  append<bf16>(qkv, {&q_weight, &k_weight, eps}, positions, token_slots, page_table, rope, {}, kv_layer, q_out);
}

/// The same on e4m3 pages; `kv_scale` is (2,) float32, of keys and of values.
void rope_append_fp8(TensorView qkv, TensorView positions, TensorView token_slots, TensorView page_table,
                     TensorView rope, TensorView kv_scale, TensorView kv_layer, TensorView q_out) {
  append<fp8>(qkv, {}, positions, token_slots, page_table, rope, scales_from(kv_scale), kv_layer, q_out);
}

void qk_norm_rope_append_fp8(TensorView qkv, TensorView q_weight, TensorView k_weight, double eps, TensorView positions,
                             TensorView token_slots, TensorView page_table, TensorView rope, TensorView kv_scale,
                             TensorView kv_layer, TensorView q_out) {
  append<fp8>(qkv, {&q_weight, &k_weight, eps}, positions, token_slots, page_table, rope, scales_from(kv_scale),
              kv_layer, q_out);
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(rope_append, rope_append);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(rope_append_fp8, rope_append_fp8);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(qk_norm_rope_append, qk_norm_rope_append);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(qk_norm_rope_append_fp8, qk_norm_rope_append_fp8);

}  // namespace
}  // namespace tpserve::cuda
