// The pairs of head_rows.cuh one after the other on the host, for test_cuda_head.py, beside what a step does anyway.
#include "head_rows.cuh"
#include "speculation_rows.cpp"

extern "C" {
void pairs(SlotState*, int count, const int32_t* positions, const int32_t* slots, const int32_t* kept_at, int max_len,
           int32_t* pair_positions, int32_t* pair_slots, int32_t* sources) {
  for (int t = 0; t < count; ++t) {
    const Pair pair = pair_of(t, positions, slots, kept_at, max_len);
    pair_positions[t] = pair.position, pair_slots[t] = pair.slot, sources[t] = pair.source;
  }
}

void keep(SlotState* s, int count, const int32_t* positions, const int32_t* slots, int32_t* kept) {
  for (int t = 0; t < count; ++t) kept[t] = is_kept(t, count, positions, slots, s->num_tokens);
}

void first(SlotState* s, int batch, int max_len, const int32_t* kept_at, const int32_t* decode_slots, int stride, int32_t* ids,
           int32_t* positions, int32_t* slots, int32_t* sample_positions) {
  for (int b = 0; b < batch; ++b) {
    first_pair(*s, b, max_len, kept_at, decode_slots, stride, ids, positions, slots, sample_positions);
  }
}
}
