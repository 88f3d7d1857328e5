// What a benchmark on random weights verifies: a draft token is right with a chosen probability, whatever the model says.
//
// Plain functions of numbers that all ranks share, so that all decide the same; no includes, since NVRTC compiles this.
#pragma once

#ifdef __CUDACC__
#define SYNTHETIC __device__ __forceinline__
#else
#define SYNTHETIC inline
#endif

/// 32 bits that are as good as drawn, by a counter: the finaliser of MurmurHash3 over each number in turn.
SYNTHETIC unsigned synthetic_bits(unsigned slot, unsigned position, unsigned salt) {
  unsigned h = salt;
  const unsigned words[2] = {slot, position};
  for (int i = 0; i < 2; ++i) {
    h = (h ^ words[i]) + 0x9E3779B9u;
    h ^= h >> 16;
    h *= 0x85EBCA6Bu;
    h ^= h >> 13;
    h *= 0xC2B2AE35u;
    h ^= h >> 16;
  }
  return h;
}

/// The token that is taken for sampled in a draft token's place: the draft's, if `bits` are below `threshold`, else
/// another. What was no token (-1: a NaN in the logits) stays so, and so does what verifies no draft token.
SYNTHETIC int synthetic_token(int sampled, int drafted, unsigned bits, unsigned threshold, int vocab_size) {
  if (sampled < 0 || drafted < 0) return sampled;
  if (bits < threshold) return drafted;
  return sampled != drafted ? sampled : (drafted + 1) % vocab_size;
}

/// Row r of a step that verifies `num_drafts` tokens for each slot: all but the last of a slot stand in for draft tokens.
SYNTHETIC void synthesize_row(int r, int num_drafts, const int* draft_tokens, int max_drafts, const int* sample_slots,
                              const int* sample_positions, unsigned threshold, unsigned salt, int vocab_size,
                              int* sampled) {
  const int slot = sample_slots[r], index = r % (1 + num_drafts);
  if (slot < 0 || index == num_drafts) return;
  const unsigned bits = synthetic_bits(slot, sample_positions[r], salt);
  sampled[r] = synthetic_token(sampled[r], draft_tokens[slot * max_drafts + index], bits, threshold, vocab_size);
}
