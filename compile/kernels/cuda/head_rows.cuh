// Which pairs an EAGLE-3 head computes; plain functions, so that the host's tests run them too.
//
// A pair is the target's row of a token and the token behind it (compile/models/eagle3.py); it has the position of the
// former. A step of the target has the tokens of pairs: the row of each is that of the token before, which stands before it
// in the step, or was computed by a step before. Of each slot one such row is kept: that of its last token that is computed
// and stays. So every pair whose row is the target's is computed in the step that runs its token, behind the target:
//
//     positions   0 ............ n - 2        | n - 1          ... n + K - 2
//     token       has a pair, with its row    | sampled last   draft tokens
//     row         kept: that of n - 2         |
//
// A round of drafts begins with the pair of the last token and the kept row, and goes on with rows that the head gives. The
// verifying step writes over them with pairs of the target's rows; those of rejected tokens are void, and written over
// before anything reads them.
#pragma once

#include "speculation_rows.cuh"

namespace tpserve::cuda {

/// Token t of a step as the second of a pair. With slot -1 there is none: at the start of a sequence, and behind a prefix
/// that was found in the cache, with its head KV.
struct Pair {
  int position, slot;
  int source;  // token of this step whose row it has; -1: the slot's kept row
};

TPSERVE_ROW Pair pair_of(int t, const int32_t* positions, const int32_t* slots, const int32_t* kept_at, int max_len) {
  const int slot = fresh(slots + t), position = fresh(positions + t) - 1;
  if (slot < 0 || position < 0 || position >= max_len) return {0, -1, -1};
  if (t > 0 && fresh(slots + t - 1) == slot) return {position, slot, t - 1};  // a slot's tokens stand side by side
  if (fresh(kept_at + slot) != position) return {0, -1, -1};
  return {position, slot, -1};
}

/// Whether the row of token t is to be kept, once it is known what was accepted. `num_tokens` is 0 while a prompt runs.
TPSERVE_ROW bool is_kept(int t, int count, const int32_t* positions, const int32_t* slots, const int32_t* num_tokens) {
  const int slot = fresh(slots + t);
  if (slot < 0) return false;
  const int held = fresh(num_tokens + slot);
  if (held > 0) return fresh(positions + t) == held - 2;
  return t + 1 == count || fresh(slots + t + 1) != slot;
}

/// Slot b in the head's first step of a round: its last token, behind the kept row. Slot -1 where it may not be drafted for.
TPSERVE_ROW void first_pair(const SlotState& s, int b, int max_len, const int32_t* kept_at, const int32_t* decode_slots,
                            int stride, int32_t* ids, int32_t* positions, int32_t* slots, int32_t* sample_positions) {
  const int slot = fresh(decode_slots + static_cast<int64_t>(b) * stride);
  int token = 0, position = 0, row_slot = -1;
  if (slot >= 0) {
    const int count = fresh(s.num_tokens + slot);
    sample_positions[b] = count;
    if (fresh(s.max_len + slot) > 0 && !is_full(s, slot) && count >= 2 && count - 1 < max_len &&
        fresh(kept_at + slot) == count - 2) {
      token = token_at(s, slot, count - 1), position = count - 2, row_slot = slot;
    }
  }
  ids[b] = token, positions[b] = position, slots[b] = row_slot;
}

}  // namespace tpserve::cuda
