// What the sampler takes, and where a row's token and its log-probabilities go.
#pragma once

#include "ranked_token.cuh"

namespace tpserve::cuda {

constexpr int kMaxTop = 20;  // best tokens of a row whose log-probabilities are asked for
constexpr int kMaxVocabSize = 1 << 18;

struct SampleParams {
  const void* logits;  // (R, width) float32 or bfloat16
  float* adjusted;     // (R, width); rows with a mask, bias or penalties are worked on here
  RankedToken* best;   // (R, kBestSlices); told by others, but for rows that have 0 in all, or found here by as many blocks
  int32_t* arrived;    // (R,): blocks of a row that have found the best of their slice; 0 between launches
  const int32_t *slots, *positions;
  const float *temperature, *top_p, *min_p, *frequency, *presence, *bias_values;
  const int32_t *top_k, *bias_ids, *bias_count, *num_logprobs;
  const int64_t* seed;
  int32_t* counts;           // null: no slot has penalties
  const int32_t* masks;      // (M, words); bit i % 32 of word i / 32: token i is allowed
  const int32_t* mask_rows;  // by slot; -1: all are
  int32_t *out_ids, *out_top_ids;
  float *out_logprob, *out_top_logprobs;
  int width, vocab_size, max_bias, num_slots, num_masks, num_slices;
  bool is_best_told;
};

}  // namespace tpserve::cuda
