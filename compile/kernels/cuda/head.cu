// What an EAGLE-3 head needs on the device beside a model's operators: its pairs (head_rows.cuh), rows side by side, and its
// logits among the target's tokens.
#include "common.cuh"
#include "head_rows.cuh"
#include "speculation.cuh"

namespace tpserve::cuda {
namespace {

constexpr int kThreads = 256;

/// Copies a row of vectors with all threads of the block.
__device__ __forceinline__ void copy_row(const uint4* from, uint4* to, int vectors) {
  for (int v = threadIdx.x; v < vectors; v += kThreads) to[v] = load_l2(from + v);
}

__global__ void __launch_bounds__(kThreads)
    pairs_kernel(const int32_t* positions, const int32_t* slots, const int32_t* kept_at, int max_len, const uint4* rows,
                 const uint4* kept, int vectors, int32_t* pair_positions, int32_t* pair_slots, uint4* pair_rows) {
  pdl_launch();
  pdl_wait();
  const int t = blockIdx.x;
  const Pair pair = pair_of(t, positions, slots, kept_at, max_len);
  if (threadIdx.x == 0) pair_positions[t] = pair.position, pair_slots[t] = pair.slot;
  uint4* target = pair_rows + static_cast<int64_t>(t) * vectors;
  if (pair.slot < 0) {
    for (int v = threadIdx.x; v < vectors; v += kThreads) target[v] = uint4{};
    return;
  }
  const uint4* source = pair.source < 0 ? kept + static_cast<int64_t>(pair.slot) * vectors
                                        : rows + static_cast<int64_t>(pair.source) * vectors;
  copy_row(source, target, vectors);
}

/// Pairs of a step's tokens (T,): their rows (T, H) are those of the tokens before, of this step's `rows` (T, H) or of those
/// kept by slot, (S, H). Where there is none, slot -1 and a row of zeros.
void head_pairs(TensorView positions, TensorView slots, TensorView kept_at, int64_t max_len, TensorView rows,
                TensorView kept, TensorView pair_positions, TensorView pair_slots, TensorView pair_rows) {
  check_rank("rows", rows, 2);
  const int64_t count = rows.size(0), hidden = rows.size(1), num_slots = kept_at.size(0);
  check_multiple("the row size", hidden, 8);
  const auto* source = reinterpret_cast<const uint4*>(checked<bf16>("rows", rows, {count, hidden}));
  const auto* held = reinterpret_cast<const uint4*>(checked<bf16>("kept", kept, {num_slots, hidden}));
  launch(pairs_kernel, dim3(static_cast<unsigned>(count)), kThreads, 0, stream_of(rows),
         checked<int32_t>("positions", positions, {count}), checked<int32_t>("slots", slots, {count}),
         checked<int32_t>("kept_at", kept_at, {num_slots}), static_cast<int>(max_len), source, held,
         static_cast<int>(hidden / 8), checked<int32_t>("pair_positions", pair_positions, {count}),
         checked<int32_t>("pair_slots", pair_slots, {count}),
         reinterpret_cast<uint4*>(checked<bf16>("pair_rows", pair_rows, {count, hidden})));
}

__global__ void __launch_bounds__(kThreads)
    keep_kernel(const int32_t* positions, const int32_t* slots, const int32_t* num_tokens, const uint4* rows, int vectors,
                uint4* kept, int32_t* kept_at) {
  pdl_launch();
  pdl_wait();
  const int t = blockIdx.x;
  if (!is_kept(t, gridDim.x, positions, slots, num_tokens)) return;
  const int slot = __ldcg(slots + t);
  if (threadIdx.x == 0) kept_at[slot] = __ldcg(positions + t);
  copy_row(rows + static_cast<int64_t>(t) * vectors, kept + static_cast<int64_t>(slot) * vectors, vectors);
}

/// Keeps, of each slot in a step of (T,) tokens, the row of its last token that stays; behind `speculation_accept`.
void head_keep(TensorView positions, TensorView slots, TensorView num_tokens, TensorView rows, TensorView kept,
               TensorView kept_at) {
  check_rank("rows", rows, 2);
  const int64_t count = rows.size(0), hidden = rows.size(1), num_slots = kept_at.size(0);
  check_multiple("the row size", hidden, 8);
  launch(keep_kernel, dim3(static_cast<unsigned>(count)), kThreads, 0, stream_of(rows),
         checked<int32_t>("positions", positions, {count}), checked<int32_t>("slots", slots, {count}),
         checked<int32_t>("num_tokens", num_tokens, {num_slots}),
         reinterpret_cast<const uint4*>(checked<bf16>("rows", rows, {count, hidden})), static_cast<int>(hidden / 8),
         reinterpret_cast<uint4*>(checked<bf16>("kept", kept, {num_slots, hidden})),
         checked<int32_t>("kept_at", kept_at, {num_slots}));
}

__global__ void first_pair_kernel(SlotState s, int batch, int max_len, const int32_t* kept_at,
                                  const int32_t* decode_slots, int stride, int32_t* ids, int32_t* positions,
                                  int32_t* slots, int32_t* sample_positions) {
  pdl_launch();
  pdl_wait();
  const int b = blockIdx.x * kThreads + threadIdx.x;
  if (b < batch) first_pair(s, b, max_len, kept_at, decode_slots, stride, ids, positions, slots, sample_positions);
}

/// The head's first step of a round: (B,) pairs of last tokens, and the positions that are sampled.
void head_begin(TensorView tokens, TensorView num_tokens, TensorView max_len, TensorView draft_tokens, TensorView kept_at,
                TensorView decode_slots, int64_t stride, int64_t head_max_len, TensorView ids, TensorView positions,
                TensorView slots, TensorView sample_positions) {
  const SlotState s = state_of(tokens, num_tokens, max_len, draft_tokens);
  const int64_t batch = batch_of(decode_slots, stride);
  launch(first_pair_kernel, dim3(static_cast<unsigned>((batch + kThreads - 1) / kThreads)), kThreads, 0, stream_of(ids), s,
         static_cast<int>(batch), static_cast<int>(head_max_len),
         checked<int32_t>("kept_at", kept_at, {tokens.size(0)}),
         checked<int32_t>("decode_slots", decode_slots, {batch * stride}), static_cast<int>(stride),
         checked<int32_t>("ids", ids, {batch}), checked<int32_t>("positions", positions, {batch}),
         checked<int32_t>("slots", slots, {batch}), checked<int32_t>("sample_positions", sample_positions, {batch}));
}

__global__ void __launch_bounds__(kThreads)
    spread_logits_kernel(const float* logits, int width, const int32_t* token_ids, int count, float* out, int out_width) {
  pdl_launch();
  pdl_wait();
  const int64_t row = blockIdx.y;
  const int i = blockIdx.x * kThreads + threadIdx.x;
  if (i < count) out[row * out_width + __ldg(token_ids + i)] = __ldcg(logits + row * width + i);
}

/// Puts logits (R, at least D) float32 of the head's tokens in the columns of the target's, `token_ids` (D,) of (R, V).
/// Other columns stay: they are -inf from the start. The ids must be less than V.
void spread_logits(TensorView logits, TensorView token_ids, TensorView out) {
  check_rank("logits", logits, 2);
  check_rank("token_ids", token_ids, 1);
  check_rank("out", out, 2);
  const int64_t rows = logits.size(0), width = logits.size(1), count = token_ids.size(0);
  if (count > width) TVM_FFI_THROW(ValueError) << count << " tokens of logits of " << width;
  const dim3 grid(static_cast<unsigned>((count + kThreads - 1) / kThreads), static_cast<unsigned>(rows));
  launch(spread_logits_kernel, grid, kThreads, 0, stream_of(out), checked<float>("logits", logits, {rows, width}),
         static_cast<int>(width), checked<int32_t>("token_ids", token_ids, {count}), static_cast<int>(count),
         checked<float>("out", out, {rows, out.size(1)}), static_cast<int>(out.size(1)));
}

constexpr int kMaxParts = 3;

struct Parts {
  const uint4* rows[kMaxParts];
};

__global__ void __launch_bounds__(kThreads)
    concat_kernel(const __grid_constant__ Parts parts, int num_parts, int vectors, uint4* out) {
  pdl_launch();
  pdl_wait();
  const int64_t row = blockIdx.x;
#pragma unroll
  for (int i = 0; i < kMaxParts; ++i) {
    if (i < num_parts) copy_row(parts.rows[i] + row * vectors, out + (row * num_parts + i) * vectors, vectors);
  }
}

void concat(std::initializer_list<const TensorView*> parts, const TensorView& out) {
  const TensorView& first = **parts.begin();
  check_rank("the first part", first, 2);
  const int64_t rows = first.size(0), size = first.size(1), count = static_cast<int64_t>(parts.size());
  check_multiple("the row size", size, 8);
  Parts p{};
  int i = 0;
  for (const TensorView* part : parts) {
    p.rows[i++] = reinterpret_cast<const uint4*>(checked<bf16>("a part", *part, {rows, size}));
  }
  launch(concat_kernel, dim3(static_cast<unsigned>(rows)), kThreads, 0, stream_of(out), p, static_cast<int>(count),
         static_cast<int>(size / 8), reinterpret_cast<uint4*>(checked<bf16>("out", out, {rows, count * size})));
}

/// (T, H) bf16 each -> side by side, (T, 2 H).
void concat_2(TensorView a, TensorView b, TensorView out) { concat({&a, &b}, out); }

/// (T, H) bf16 each -> side by side, (T, 3 H).
void concat_3(TensorView a, TensorView b, TensorView c, TensorView out) { concat({&a, &b, &c}, out); }

TVM_FFI_DLL_EXPORT_TYPED_FUNC(head_pairs, head_pairs);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(head_keep, head_keep);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(head_begin, head_begin);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(spread_logits, spread_logits);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(concat_2, concat_2);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(concat_3, concat_3);

}  // namespace
}  // namespace tpserve::cuda
