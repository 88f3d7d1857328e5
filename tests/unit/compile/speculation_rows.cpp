// The rows of speculation_rows.cuh one after the other on the host, for test_cuda_speculation.py.
#include "speculation_rows.cuh"

using namespace tpserve::cuda;

extern "C" {
void load(SlotState* s, int count, int num_drafts, int32_t* ids, int32_t* positions, int32_t* slots, int num_rows,
          const int32_t* rows, int32_t* sample_slots, int32_t* sample_positions) {
  for (int t = count - 1; t >= 0; --t) load_token(*s, t, num_drafts, ids, positions, slots);
  for (int r = 0; r < num_rows; ++r) load_row(r, rows, positions, slots, sample_slots, sample_positions);
}

void accept(SlotState* s, int num_groups, int num_decodes, int num_drafts, const int32_t* sampled,
            const int32_t* sample_slots, const int32_t* sample_positions, int32_t* counts, int32_t* drafted) {
  for (int g = num_groups - 1; g >= 0; --g) {
    accept_group(*s, g, num_decodes, num_drafts, sampled, sample_slots, sample_positions, counts, drafted);
  }
}

void window(SlotState* s, int batch, int size, int behind, int draft_max_len, const int32_t* decode_slots, int stride, int32_t* ids,
            int32_t* positions, int32_t* slots, int32_t* sample_slots, int32_t* sample_positions) {
  for (int t = 0; t < batch * size; ++t) {
    draft_window(*s, t / size, t % size, size, behind, draft_max_len, decode_slots, stride, ids, positions, slots, sample_slots,
                 sample_positions);
  }
}

void later(SlotState* s, int batch, int num_steps, int pitch, int behind, int draft_max_len, const int32_t* first_slots,
           int32_t* positions, int32_t* slots, int32_t* sample_positions) {
  for (int i = 0; i < num_steps * batch; ++i) {
    const int row = i / batch * pitch;
    draft_later(*s, i % batch, 1 + i / batch, behind, draft_max_len, first_slots, positions + row, slots + row,
                sample_positions + row);
  }
}

void prompt(SlotState*, int count, int draft_max_len, const int32_t* positions, const int32_t* slots, int32_t* draft_slots) {
  for (int t = 0; t < count; ++t) draft_prompt(t, draft_max_len, positions, slots, draft_slots);
}

void tell(SlotState* s, int num_slots, int32_t* words) {
  const int width = told_words(*s);
  for (int i = 0; i < num_slots * width; ++i) words[i] = told_word(*s, i / width, i % width);
}

void take(SlotState* s, int num_slots, const int32_t* words) {
  const int width = told_words(*s);
  for (int i = num_slots * width - 1; i >= 0; --i) take_told(*s, i / width, i % width, words + i / width * width);
}

void lookup(SlotState* s, int batch, int num_drafts, int least, int most, int threads, const int32_t* decode_slots,
            int stride) {
  for (int b = 0; b < batch; ++b) {
    const int slot = decode_slots[b * stride];
    if (slot < 0) continue;
    const int num_tokens = lookup_tokens(*s, slot);
    int64_t best = 0;
    for (int thread = 0; thread < threads; ++thread) {
      const int64_t own = find_run(*s, slot, num_tokens, thread, threads, least, most);
      if (own > best) best = own;
    }
    for (int index = 0; index < num_drafts; ++index) store_lookup(*s, slot, num_tokens, best, index);
  }
}

void store(SlotState* s, int batch, int index, const int32_t* decode_slots, int stride, const int32_t* sampled,
           const int32_t* row_slots, int32_t* next_ids) {
  for (int b = 0; b < batch; ++b) store_draft(*s, b, index, decode_slots, stride, sampled, row_slots, next_ids);
}
}
