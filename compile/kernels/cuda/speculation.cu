// Steps of a replica that speculates: what the device does before and after the target's and the draft's graphs, see
// speculation_rows.cuh. Each kernel has one thread for a row, a group or a slot; a lookup has a block for a slot.
#include "speculation.cuh"

namespace tpserve::cuda {
namespace {

constexpr int kThreads = 256;

dim3 blocks_for(int64_t count) { return dim3(static_cast<unsigned>((count + kThreads - 1) / kThreads)); }

__device__ __forceinline__ int index_of_thread() { return blockIdx.x * kThreads + threadIdx.x; }

__global__ void load_tokens_kernel(SlotState s, int count, int num_drafts, int32_t* ids, int32_t* positions,
                                   int32_t* slots) {
  pdl_launch();
  pdl_wait();
  const int t = index_of_thread();
  if (t < count) load_token(s, t, num_drafts, ids, positions, slots);
}

__global__ void load_rows_kernel(int count, const int32_t* rows, const int32_t* positions, const int32_t* slots,
                                 int32_t* sample_slots, int32_t* sample_positions) {
  pdl_launch();
  pdl_wait();
  const int r = index_of_thread();
  if (r < count) load_row(r, rows, positions, slots, sample_slots, sample_positions);
}

/// Gives a step's rows (T,), (R,) their tokens, positions and slots, in place.
void speculation_load(TensorView tokens, TensorView num_tokens, TensorView max_len, TensorView draft_tokens,
                      int64_t num_drafts, TensorView ids, TensorView positions, TensorView slots, TensorView rows,
                      TensorView sample_slots, TensorView sample_positions) {
  const SlotState s = state_of(tokens, num_tokens, max_len, draft_tokens);
  const int64_t count = ids.size(0), num_rows = rows.size(0);
  if (num_drafts < 0 || num_drafts > s.max_drafts) {
    TVM_FFI_THROW(ValueError) << num_drafts << " draft tokens, expected 0 to " << s.max_drafts;
  }
  int32_t* position = checked<int32_t>("positions", positions, {count});
  int32_t* slot = checked<int32_t>("slots", slots, {count});
  launch(load_tokens_kernel, blocks_for(count), kThreads, 0, stream_of(ids), s, static_cast<int>(count),
         static_cast<int>(num_drafts), checked<int32_t>("ids", ids, {count}), position, slot);
  launch(load_rows_kernel, blocks_for(num_rows), kThreads, 0, stream_of(ids), static_cast<int>(num_rows),
         checked<int32_t>("rows", rows, {num_rows}), position, slot,
         checked<int32_t>("sample_slots", sample_slots, {num_rows}),
         checked<int32_t>("sample_positions", sample_positions, {num_rows}));
}

__global__ void accept_kernel(SlotState s, int num_groups, int num_decodes, int num_drafts, const int32_t* sampled,
                              const int32_t* sample_slots, const int32_t* sample_positions, int32_t* counts,
                              int32_t* drafted) {
  pdl_launch();
  pdl_wait();
  const int g = index_of_thread();
  if (g < num_groups) {
    accept_group(s, g, num_decodes, num_drafts, sampled, sample_slots, sample_positions, counts, drafted);
  }
}

/// Takes the sampled tokens (R,) of a step: (G,) counts and draft tokens verified, by decoding slot and then by chunk.
void speculation_accept(TensorView tokens, TensorView num_tokens, TensorView max_len, TensorView draft_tokens,
                        int64_t num_decodes, int64_t num_drafts, TensorView sampled, TensorView sample_slots,
                        TensorView sample_positions, TensorView counts, TensorView drafted) {
  const SlotState s = state_of(tokens, num_tokens, max_len, draft_tokens);
  const int64_t num_rows = sample_slots.size(0), num_groups = num_rows - num_decodes * num_drafts;
  if (num_decodes < 0 || num_drafts < 0 || num_drafts > s.max_drafts || num_groups < num_decodes) {
    TVM_FFI_THROW(ValueError) << num_decodes << " slots of " << num_drafts << " draft tokens do not fit in " << num_rows
                              << " rows";
  }
  launch(accept_kernel, blocks_for(num_groups), kThreads, 0, stream_of(sampled), s, static_cast<int>(num_groups),
         static_cast<int>(num_decodes), static_cast<int>(num_drafts),
         checked<int32_t>("sampled", sampled, {num_rows}), checked<int32_t>("sample_slots", sample_slots, {num_rows}),
         checked<int32_t>("sample_positions", sample_positions, {num_rows}),
         checked<int32_t>("counts", counts, {num_groups}), checked<int32_t>("drafted", drafted, {num_groups}));
}

__global__ void draft_window_kernel(SlotState s, int count, int window, int behind, int draft_max_len,
                                    const int32_t* decode_slots, int stride, int32_t* ids, int32_t* positions,
                                    int32_t* slots, int32_t* sample_slots, int32_t* sample_positions) {
  pdl_launch();
  pdl_wait();
  const int t = index_of_thread();
  if (t < count) {
    draft_window(s, t / window, t % window, window, behind, draft_max_len, decode_slots, stride, ids, positions, slots,
                 sample_slots, sample_positions);
  }
}

/// The draft's first step of a round: (B * window,) tokens of (B,) slots, and the (B,) slots and positions that it samples.
void draft_begin(TensorView tokens, TensorView num_tokens, TensorView max_len, TensorView draft_tokens,
                 TensorView decode_slots, int64_t stride, int64_t window, int64_t behind, int64_t draft_max_len,
                 TensorView ids, TensorView positions, TensorView slots, TensorView sample_slots,
                 TensorView sample_positions) {
  const SlotState s = state_of(tokens, num_tokens, max_len, draft_tokens);
  const int64_t batch = batch_of(decode_slots, stride), count = batch * window;
  if (window < 1 || behind < 0) TVM_FFI_THROW(ValueError) << "a window of " << window << " tokens, " << behind << " behind";
  launch(draft_window_kernel, blocks_for(count), kThreads, 0, stream_of(ids), s, static_cast<int>(count),
         static_cast<int>(window), static_cast<int>(behind), static_cast<int>(draft_max_len),
         checked<int32_t>("decode_slots", decode_slots, {batch * stride}), static_cast<int>(stride),
         checked<int32_t>("ids", ids, {count}),
         checked<int32_t>("positions", positions, {count}), checked<int32_t>("slots", slots, {count}),
         checked<int32_t>("sample_slots", sample_slots, {batch}),
         checked<int32_t>("sample_positions", sample_positions, {batch}));
}

__global__ void draft_later_kernel(SlotState s, int batch, int num_steps, int pitch, int behind, int draft_max_len,
                                   const int32_t* first_slots, int32_t* positions, int32_t* slots,
                                   int32_t* sample_positions) {
  pdl_launch();
  pdl_wait();
  const int i = index_of_thread(), step = i / batch, b = i % batch, row = step * pitch;
  if (step < num_steps) {
    draft_later(s, b, 1 + step, behind, draft_max_len, first_slots, positions + row, slots + row, sample_positions + row);
  }
}

/// Where the draft's later steps of a round run and sample: (N, P) each, of which the first B columns are for the (B,) slots
/// of the first step's sampled rows. Step i of them runs draft token i and samples i + 1. `behind`: positions between a token
/// and where it runs, 1 of an EAGLE-3 head's pairs.
void draft_later(TensorView tokens, TensorView num_tokens, TensorView max_len, TensorView draft_tokens,
                 TensorView first_slots, int64_t behind, int64_t draft_max_len, TensorView positions, TensorView slots,
                 TensorView sample_positions) {
  const SlotState s = state_of(tokens, num_tokens, max_len, draft_tokens);
  check_rank("first_slots", first_slots, 1);
  check_rank("positions", positions, 2);
  const int64_t batch = first_slots.size(0), steps = positions.size(0), pitch = positions.size(1);
  if (steps >= s.max_drafts || batch > pitch) {
    TVM_FFI_THROW(ValueError) << steps << " later steps of " << batch << " slots, expected fewer than " << s.max_drafts
                              << " of " << pitch << " at most";
  }
  if (behind < 0 || behind > 1) TVM_FFI_THROW(ValueError) << behind << " positions behind, expected 0 or 1";
  launch(draft_later_kernel, blocks_for(steps * batch), kThreads, 0, stream_of(positions), s, static_cast<int>(batch),
         static_cast<int>(steps), static_cast<int>(pitch), static_cast<int>(behind), static_cast<int>(draft_max_len),
         checked<int32_t>("first_slots", first_slots, {batch}), checked<int32_t>("positions", positions, {steps, pitch}),
         checked<int32_t>("slots", slots, {steps, pitch}),
         checked<int32_t>("sample_positions", sample_positions, {steps, pitch}));
}

/// No kernel behind it starts before all kernels in front of it have ended: attention of the next step, which starts early,
/// then finds pages as this step has left them.
__global__ void draft_store_kernel(SlotState s, int batch, int index, const int32_t* decode_slots, int stride,
                                   const int32_t* sampled, const int32_t* row_slots, int32_t* next_ids) {
  pdl_wait();
  pdl_launch();
  const int b = index_of_thread();
  if (b < batch) store_draft(s, b, index, decode_slots, stride, sampled, row_slots, next_ids);
}

/// What the draft sampled becomes draft token `index` of each slot, and what its next step runs; (B,) all.
void draft_store(TensorView tokens, TensorView num_tokens, TensorView max_len, TensorView draft_tokens,
                 TensorView decode_slots, int64_t stride, int64_t index, TensorView sampled, TensorView row_slots,
                 TensorView next_ids) {
  const SlotState s = state_of(tokens, num_tokens, max_len, draft_tokens);
  const int64_t batch = batch_of(decode_slots, stride);
  if (index < 0 || index >= s.max_drafts) {
    TVM_FFI_THROW(ValueError) << "draft token " << index << ", expected 0 to " << s.max_drafts - 1;
  }
  launch(draft_store_kernel, blocks_for(batch), kThreads, 0, stream_of(sampled), s, static_cast<int>(batch),
         static_cast<int>(index), checked<int32_t>("decode_slots", decode_slots, {batch * stride}),
         static_cast<int>(stride),
         checked<int32_t>("sampled", sampled, {batch}), checked<int32_t>("row_slots", row_slots, {batch}),
         checked<int32_t>("next_ids", next_ids, {batch}));
}

/// A block for each slot.
__global__ void __launch_bounds__(kThreads)
    draft_lookup_kernel(SlotState s, int num_drafts, int least, int most, const int32_t* decode_slots, int stride) {
  __shared__ int64_t scratch[32];
  pdl_launch();
  pdl_wait();
  const int slot = fresh(decode_slots + static_cast<int64_t>(blockIdx.x) * stride);
  if (slot < 0) return;
  const int num_tokens = lookup_tokens(s, slot);
  const int64_t own = find_run(s, slot, num_tokens, threadIdx.x, kThreads, least, most);
  const int64_t found = block_reduce(own, int64_t{0}, scratch, Max());
  if (threadIdx.x < num_drafts) store_lookup(s, slot, num_tokens, found, threadIdx.x);
}

/// All draft tokens of each slot by prompt lookup: runs of `least` to `most` last tokens are searched for.
void draft_lookup(TensorView tokens, TensorView num_tokens, TensorView max_len, TensorView draft_tokens,
                  TensorView decode_slots, int64_t stride, int64_t num_drafts, int64_t least, int64_t most) {
  const SlotState s = state_of(tokens, num_tokens, max_len, draft_tokens);
  const int64_t batch = batch_of(decode_slots, stride);
  if (num_drafts < 1 || num_drafts > s.max_drafts) {
    TVM_FFI_THROW(ValueError) << num_drafts << " draft tokens, expected 1 to " << s.max_drafts;
  }
  if (least < 1 || most < least) TVM_FFI_THROW(ValueError) << "runs of " << least << " to " << most << " tokens";
  launch(draft_lookup_kernel, dim3(static_cast<unsigned>(batch)), kThreads, 0, stream_of(tokens), s,
         static_cast<int>(num_drafts), static_cast<int>(least), static_cast<int>(most),
         checked<int32_t>("decode_slots", decode_slots, {batch * stride}), static_cast<int>(stride));
}

__global__ void note_time_kernel(int64_t* times, int which) {
  pdl_launch();
  pdl_wait();
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(times[which]));
}

/// The device's clock, in nanoseconds, when all before this has run, as (2,) int64 times' `which`.
void note_time(TensorView times, int64_t which) {
  if (which < 0 || which > 1) TVM_FFI_THROW(ValueError) << "time " << which << " of two";
  launch(note_time_kernel, dim3(1), 1, 0, stream_of(times), checked<int64_t>("times", times, {2}),
         static_cast<int>(which));
}

__global__ void draft_prompts_kernel(int count, int draft_max_len, const int32_t* positions, const int32_t* slots,
                                     int32_t* draft_slots) {
  pdl_launch();
  pdl_wait();
  const int t = index_of_thread();
  if (t < count) draft_prompt(t, draft_max_len, positions, slots, draft_slots);
}

/// Slots (T,) of the draft's pass over a step with prompts, all but those of tokens that are beyond its length.
void draft_prompts(TensorView positions, TensorView slots, int64_t draft_max_len, TensorView draft_slots) {
  const int64_t count = positions.size(0);
  launch(draft_prompts_kernel, blocks_for(count), kThreads, 0, stream_of(slots), static_cast<int>(count),
         static_cast<int>(draft_max_len), checked<int32_t>("positions", positions, {count}),
         checked<int32_t>("slots", slots, {count}), checked<int32_t>("draft_slots", draft_slots, {count}));
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(note_time, note_time);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(speculation_load, speculation_load);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(speculation_accept, speculation_accept);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(draft_begin, draft_begin);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(draft_later, draft_later);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(draft_lookup, draft_lookup);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(draft_prompts, draft_prompts);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(draft_store, draft_store);

}  // namespace
}  // namespace tpserve::cuda
