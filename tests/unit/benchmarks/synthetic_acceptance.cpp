// The rows of synthetic_acceptance.cuh one after the other on the host, for test_gpu_speculation.py.
#include "synthetic_acceptance.cuh"

extern "C" {
unsigned bits(unsigned slot, unsigned position, unsigned salt) { return synthetic_bits(slot, position, salt); }

void synthesize(int num_rows, int num_drafts, const int* draft_tokens, int max_drafts, const int* sample_slots,
                const int* sample_positions, unsigned threshold, unsigned salt, int vocab_size, int* sampled) {
  for (int r = 0; r < num_rows; ++r) {
    synthesize_row(r, num_drafts, draft_tokens, max_drafts, sample_slots, sample_positions, threshold, salt, vocab_size,
                   sampled);
  }
}
}
