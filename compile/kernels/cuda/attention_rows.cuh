// Sixteen query rows of a prompt in a warp: their products with slices of sixteen positions, and the online softmax
// between them.
#pragma once

#include "attention_fragments.cuh"
#include "attention_params.cuh"
#include "hopper.cuh"

namespace tpserve::cuda {

/// Writes a row of an item from its first token on; `values(i)` are a thread's, of dimensions 8 n + 2 (lane % 4) and the next
/// for i = 2 n and 2 n + 1, `sum` is that of weights. The four lanes of a row go the same way, and no others shuffle with them.
template <typename KV, int kHeadDim, Out kOut, typename Values>
__device__ __forceinline__ void write_row(const AttentionParams<KV>& p, int first_token, int head, int row,
                                          const Values& values, float sum) {
  const int lane = threadIdx.x % 32;
  const int token = first_token + row / p.group, query_head = head * p.group + row % p.group;
  const int64_t at = out_at<kHeadDim>(p, token, query_head) + lane % 4 * 2;
  const float inverse = value_scale(p) / sum;
  if constexpr (kOut == Out::kBf16) {
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      *reinterpret_cast<uint32_t*>(p.out + at + n * 8) =
          pack2(values(n * 2) * inverse, values(n * 2 + 1) * inverse);
    }
  } else {
    constexpr int kRows = kRowsOfScale<kOut, kHeadDim>;  // beside each other, all there or none
    const uint32_t lanes = ((1u << kRows * 4) - 1) << lane / (kRows * 4) * (kRows * 4);
    float largest = 0.0f;
#pragma unroll
    for (int i = 0; i < kHeadDim / 4; ++i) largest = fmaxf(largest, fabsf(values(i)));
    largest = fmaxf(largest, __shfl_xor_sync(lanes, largest, 1));
    largest = fmaxf(largest, __shfl_xor_sync(lanes, largest, 2));
    largest *= inverse;
    if constexpr (kRows == 2) largest = fmaxf(largest, __shfl_xor_sync(lanes, largest, 4));
    const float factor = inverse * store_scale(p, token, query_head / kRows, largest, lane % (kRows * 4) == 0);
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      *reinterpret_cast<uint16_t*>(p.quantized + at + n * 8) =
          static_cast<uint16_t>(pack4_fp8(values(n * 2) * factor, values(n * 2 + 1) * factor, 0.0f, 0.0f));
    }
  }
}

/// Online softmax state of a warp's sixteen rows; a thread has rows lane / 4 and lane / 4 + 8.
template <typename KV, int kHeadDim>
struct Rows {
  using F = Fragments<KV, kHeadDim>;
  uint32_t q[kHeadDim / 16][4];
  float out[kHeadDim / 8][4];
  float top[2], sum[2];  // `sum` is this thread's part
  int limit[2];          // last position that a row sees

  __device__ void start(const AttentionParams<KV>& p, const Item& item, int first_row) {
    const int lane = threadIdx.x % 32, num_rows = item.count * p.group;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + lane / 4 + h * 8;
      // Rows that are not there repeat the last token; whatever they hold is never written.
      limit[h] = item.position + (row < num_rows ? row / p.group : item.count - 1);
      top[h] = -INFINITY, sum[h] = 0.0f;
    }
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) out[n][0] = out[n][1] = out[n][2] = out[n][3] = 0.0f;
  }

  __device__ void load_queries(const AttentionParams<KV>& p, const Item& item, int head, int first_row) {
    const int lane = threadIdx.x % 32, num_rows = item.count * p.group;
    const int num_heads = p.kv.num_kv_heads * p.group;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + lane / 4 + h * 8;
      const bool present = row < num_rows;
      const bf16* source = p.q + (static_cast<int64_t>(item.token + (present ? row / p.group : 0)) * num_heads +
                                  head * p.group + (present ? row % p.group : 0)) * kHeadDim + lane % 4 * 2;
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; ++k) {
        q[k][h] = present ? F::query2(__ldcg(reinterpret_cast<const uint32_t*>(source + k * 16))) : 0;
        q[k][h + 2] = present ? F::query2(__ldcg(reinterpret_cast<const uint32_t*>(source + k * 16 + 8))) : 0;
      }
    }
  }

  /// Takes `kSlices` slices of sixteen positions, the first at `position`, from `slices` in shared memory.
  template <int kSlices>
  __device__ __forceinline__ void attend(uint32_t slices, int position, const Range& range, int window, float scale) {
    const int lane = threadIdx.x % 32;
    float score[kSlices * 2][4];
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) score[s * 2][i] = score[s * 2 + 1][i] = 0.0f;
#pragma unroll
      for (int k = 0; k < kHeadDim / 16; k += F::kColumns) {
        uint32_t b[F::kColumns][4];
        F::keys(slices, s, lane, k, b);
#pragma unroll
        for (int c = 0; c < F::kColumns; ++c) {
          F::multiply_add(score[s * 2], q[k + c], b[c][0], b[c][1]);
          F::multiply_add(score[s * 2 + 1], q[k + c], b[c][2], b[c][3]);
        }
      }
    }
    // Uniform over the warp: does any row see less than all of these positions?
    const bool inside = __all_sync(~0u, position + kSlices * 16 - 1 <= min(limit[0], limit[1]) &&
                                            (window == 0 || position > max(limit[0], limit[1]) - window));
    if (!inside) {
#pragma unroll
      for (int n = 0; n < kSlices * 2; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int at = position + n * 8 + lane % 4 * 2 + i % 2, last = limit[i / 2];
          if (at > last || (window > 0 && at <= last - window)) score[n][i] = -INFINITY;
        }
      }
    }
    float shift[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float best = top[h];
#pragma unroll
      for (int n = 0; n < kSlices * 2; ++n) best = fmaxf(best, fmaxf(score[n][h * 2], score[n][h * 2 + 1]));
      best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
      best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
      shift[h] = best == -INFINITY ? 0.0f : best * scale;
      const float factor = fast_exp2(top[h] * scale - shift[h]);
      top[h] = best;
      sum[h] *= factor;
#pragma unroll
      for (int n = 0; n < kHeadDim / 8; ++n) out[n][h * 2] *= factor, out[n][h * 2 + 1] *= factor;
    }
    // Rows that nobody wrote may hold NaN, which a weight of zero would not remove.
    const bool whole = position >= (range.begin & ~15) && position + kSlices * 16 <= range.end;
#pragma unroll
    for (int s = 0; s < kSlices; ++s) {
      uint32_t a[4];
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const float x = fast_exp2(fmaf(score[s * 2 + n][h * 2], scale, -shift[h]));
          const float y = fast_exp2(fmaf(score[s * 2 + n][h * 2 + 1], scale, -shift[h]));
          sum[h] += x + y;
          a[n * 2 + h] = F::weight2(x, y);
        }
      }
      uint32_t keep[2] = {~0u, ~0u};
      if (!whole) {
#pragma unroll
        for (int n = 0; n < 2; ++n) {
          const int at = position + s * 16 + n * 8 + lane % 4 * 2;
          const int low = range.begin & ~15;
          keep[n] = (at >= low && at < range.end ? 0xFFFFu : 0u) |
                    (at + 1 >= low && at + 1 < range.end ? 0xFFFF0000u : 0u);
        }
      }
#pragma unroll
      for (int n = 0; n < kHeadDim / 16; n += F::kColumns) {
        uint32_t b[F::kColumns][4];
        F::values(slices, s, lane, n, b);
#pragma unroll
        for (int c = 0; c < F::kColumns; ++c) {
          F::multiply_add(out[(n + c) * 2], a, b[c][0] & keep[0], b[c][1] & keep[1]);
          F::multiply_add(out[(n + c) * 2 + 1], a, b[c][2] & keep[0], b[c][3] & keep[1]);
        }
      }
    }
  }

  __device__ void finish_sums() {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      sum[h] += __shfl_xor_sync(~0u, sum[h], 1);
      sum[h] += __shfl_xor_sync(~0u, sum[h], 2);
    }
  }

  template <Out kOut>
  __device__ void write(const AttentionParams<KV>& p, const Item& item, int head, int first_row) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int row = first_row + threadIdx.x % 32 / 4 + h * 8;
      if (row >= item.count * p.group) continue;
      const auto values = [&](int i) { return out[i / 2][h * 2 + i % 2]; };
      write_row<KV, kHeadDim, kOut>(p, item.token, head, row, values, sum[h]);
    }
  }
};

}  // namespace tpserve::cuda
