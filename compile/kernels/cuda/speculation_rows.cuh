// What one row does in a step that may verify draft tokens; plain functions, so that the host's tests run them too.
//
// Of a replica that speculates only the device knows how many tokens a slot has. The host lays a step out by slots:
// decoding slot b has the rows b * (1 + K) ... b * (1 + K) + K with token ids -1, -2, ..., -1 - K ("the last token", "the
// first draft token", ...), and chunks of prompts follow with their tokens. Here rows get tokens, positions and, where a
// slot has fewer draft tokens or is at its end, slot -1, which every kernel takes as padding.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TPSERVE_ROW __host__ __device__ __forceinline__
#else
#define TPSERVE_ROW inline
#endif

namespace tpserve::cuda {

/// What is known of every slot, on the device. All int32.
struct SlotState {
  int32_t* tokens;        // (S, width): prompt and output
  int32_t* num_tokens;    // (S,): the last of them is sampled, but not computed
  int32_t* max_len;       // (S,): tokens at which the sequence ends; 0: it does not speculate, the host removes it in time
  int32_t* draft_tokens;  // (S, max_drafts): proposed for this step, -1 from where nothing is
  int width, max_drafts;
};

/// Reads what another kernel may have written just before.
TPSERVE_ROW int32_t fresh(const int32_t* p) {
#ifdef __CUDA_ARCH__
  return __ldcg(p);
#else
  return *p;
#endif
}

TPSERVE_ROW int32_t token_at(const SlotState& s, int slot, int position) {
  return fresh(s.tokens + static_cast<int64_t>(slot) * s.width + position);
}

TPSERVE_ROW int32_t draft_at(const SlotState& s, int slot, int index) {
  return fresh(s.draft_tokens + static_cast<int64_t>(slot) * s.max_drafts + index);
}

TPSERVE_ROW bool is_full(const SlotState& s, int slot) {
  const int max_len = fresh(s.max_len + slot);
  return max_len > 0 && fresh(s.num_tokens + slot) >= max_len;
}

/// Draft tokens that a slot has use for: what it lacks to its end less one. It has no pages for more.
TPSERVE_ROW int draft_room(const SlotState& s, int slot) {
  return fresh(s.max_len + slot) - fresh(s.num_tokens + slot) - 1;
}

/// How many of its draft tokens a slot verifies: those that it has use for, up to the first that is missing.
TPSERVE_ROW int num_verified(const SlotState& s, int slot, int num_drafts) {
  const int room = draft_room(s, slot);
  int count = 0;
  while (count < num_drafts && count < room && draft_at(s, slot, count) >= 0) ++count;
  return count;
}

/// Token t of the target's step. Ids, positions and slots come as the host laid them out and become those to run.
TPSERVE_ROW void load_token(const SlotState& s, int t, int num_drafts, int32_t* ids, int32_t* positions, int32_t* slots) {
  const int slot = fresh(slots + t), id = fresh(ids + t);
  if (slot >= 0 && id >= 0) {  // of a prompt
    s.tokens[static_cast<int64_t>(slot) * s.width + fresh(positions + t)] = id;
    return;
  }
  int token = 0, position = 0, row_slot = -1;
  if (slot >= 0 && !is_full(s, slot)) {
    const int index = -1 - id, last = fresh(s.num_tokens + slot) - 1;
    if (index == 0) {
      token = token_at(s, slot, last), position = last, row_slot = slot;
    } else if (index <= num_verified(s, slot, num_drafts)) {
      token = draft_at(s, slot, index - 1), position = last + index, row_slot = slot;
    }
  }
  ids[t] = token, positions[t] = position, slots[t] = row_slot;
}

/// Sampled row r follows its token.
TPSERVE_ROW void load_row(int r, const int32_t* rows, const int32_t* positions, const int32_t* slots,
                          int32_t* sample_slots, int32_t* sample_positions) {
  if (fresh(sample_slots + r) < 0) return;
  const int t = fresh(rows + r);
  sample_slots[r] = fresh(slots + t);
  sample_positions[r] = fresh(positions + t) + 1;
}

/// Group g of sampled rows: decoding slot g, or behind them a prompt's last chunk. A draft token is accepted if it is the
/// token sampled in its place; `counts` gets how many tokens the group gives, of which the first rows are.
TPSERVE_ROW void accept_group(const SlotState& s, int g, int num_decodes, int num_drafts, const int32_t* sampled,
                              const int32_t* sample_slots, const int32_t* sample_positions, int32_t* counts,
                              int32_t* drafted) {
  const bool decodes = g < num_decodes;
  const int row = decodes ? g * (1 + num_drafts) : num_decodes * num_drafts + g;
  const int slot = fresh(sample_slots + row);
  counts[g] = drafted[g] = 0;
  if (slot < 0) return;
  const int rows = decodes ? 1 + num_drafts : 1;
  int verified = 0;
  while (verified + 1 < rows && fresh(sample_slots + row + verified + 1) >= 0) ++verified;
  int count = 0;
  for (bool right = true; right; ++count) {
    const int32_t token = fresh(sampled + row + count);
    s.tokens[static_cast<int64_t>(slot) * s.width + fresh(sample_positions + row + count)] = token;
    right = count < verified && draft_at(s, slot, count) == token;
  }
  s.num_tokens[slot] = fresh(sample_positions + row + count - 1) + 1;
  counts[g] = count, drafted[g] = verified;
}

// The draft's rows go by decoding slot b, whose number is `decode_slots[b * stride]`: in the step as it was laid out.

/// Row w of slot b in the draft's first step of a round: one of the last `window` tokens before the last `behind`, so that
/// whatever the round before left out is computed, and what it computed of rejected tokens is written over. The last row
/// of each slot is sampled.
TPSERVE_ROW void draft_window(const SlotState& s, int b, int w, int window, int behind, int draft_max_len,
                              const int32_t* decode_slots, int stride, int32_t* ids, int32_t* positions, int32_t* slots,
                              int32_t* sample_slots, int32_t* sample_positions) {
  const int t = b * window + w, slot = fresh(decode_slots + static_cast<int64_t>(b) * stride);
  int token = 0, position = 0, row_slot = -1;
  if (slot >= 0) {
    const int count = fresh(s.num_tokens + slot), at = count - behind - window + w;
    if (fresh(s.max_len + slot) > 0 && !is_full(s, slot) && at >= 0 && count < draft_max_len) {
      token = token_at(s, slot, at), position = at, row_slot = slot;
    }
    if (w == window - 1) sample_positions[b] = count;
  }
  if (w == window - 1) sample_slots[b] = row_slot;
  ids[t] = token, positions[t] = position, slots[t] = row_slot;
}

/// Slot b in step `index` of a round, of which the first is 0: draft token `index` - 1 runs, and `index` is sampled. Where is
/// known before it is known which token that is. `behind`: how many positions before its own the token runs. `first_slots`:
/// of the first step's sampled rows.
TPSERVE_ROW void draft_later(const SlotState& s, int b, int index, int behind, int draft_max_len, const int32_t* first_slots,
                             int32_t* positions, int32_t* slots, int32_t* sample_positions) {
  const int slot = fresh(first_slots + b);
  int position = 0, row_slot = -1, own = 0;
  if (slot >= 0) {
    own = fresh(s.num_tokens + slot) + index - 1;
    if (index < draft_room(s, slot) && own - behind + 1 < draft_max_len) position = own - behind, row_slot = slot;
  }
  positions[b] = position, slots[b] = row_slot, sample_positions[b] = own + 1;
}

/// Token t of a step with prompts runs through the draft, too, unless it is beyond the draft's length: there are no angles
/// for such a position.
TPSERVE_ROW void draft_prompt(int t, int draft_max_len, const int32_t* positions, const int32_t* slots,
                              int32_t* draft_slots) {
  draft_slots[t] = fresh(positions + t) < draft_max_len ? fresh(slots + t) : -1;
}

/// What the draft sampled for slot b becomes its draft token `index`, -1 where the draft has not run, and what its next step
/// runs in `next_ids`, which has a token in any case.
TPSERVE_ROW void store_draft(const SlotState& s, int b, int index, const int32_t* decode_slots, int stride,
                             const int32_t* sampled, const int32_t* row_slots, int32_t* next_ids) {
  const int slot = fresh(decode_slots + static_cast<int64_t>(b) * stride);
  const int token = fresh(row_slots + b) < 0 ? -1 : fresh(sampled + b);
  next_ids[b] = token < 0 ? 0 : token;
  if (slot >= 0) s.draft_tokens[static_cast<int64_t>(slot) * s.max_drafts + index] = token;
}

// Prompt lookup (worker/proposers/ngram.py, whose text this must give): what followed the last tokens before follows again.

/// Tokens of a slot that a lookup may look at; 0 where it may not draft.
TPSERVE_ROW int lookup_tokens(const SlotState& s, int slot) {
  return fresh(s.max_len + slot) <= 0 || is_full(s, slot) ? 0 : fresh(s.num_tokens + slot);
}

/// Where the longest run of a slot's last `least` to `most` tokens ended before, at one of the positions `first`,
/// `first` + `step`, ...: of runs as long, the last one. As length * 2^32 + end + 1, so that the best of several is the
/// greatest; 0 for none.
TPSERVE_ROW int64_t find_run(const SlotState& s, int slot, int num_tokens, int first, int step, int least, int most) {
  if (num_tokens < 2) return 0;
  const int32_t last = token_at(s, slot, num_tokens - 1);
  int64_t best = 0;
  for (int end = first; end < num_tokens - 1; end += step) {
    if (token_at(s, slot, end) != last) continue;
    int length = 1;
    while (length < most && length <= end && token_at(s, slot, end - length) == token_at(s, slot, num_tokens - 1 - length)) {
      ++length;
    }
    const int64_t found = static_cast<int64_t>(length) << 32 | (end + 1);
    if (length >= least && found > best) best = found;
  }
  return best;
}

/// Draft token `index` of a slot, from what `find_run` found; a run so near that it reaches the end repeats itself.
TPSERVE_ROW void store_lookup(const SlotState& s, int slot, int num_tokens, int64_t found, int index) {
  const int next = static_cast<int>(found & 0x7fffffff), period = num_tokens - next;
  s.draft_tokens[static_cast<int64_t>(slot) * s.max_drafts + index] =
      found == 0 ? -1 : token_at(s, slot, next + index % period);
}

// A draft with GPUs of its own keeps slots as the model does, and is told after each step where they are: of each slot its
// number of tokens and the last of them, as many as a step can give, the last one first.

/// Words of one slot in that message.
TPSERVE_ROW int told_words(const SlotState& s) { return 2 + s.max_drafts; }

/// Word w of a slot's.
TPSERVE_ROW int32_t told_word(const SlotState& s, int slot, int w) {
  const int count = fresh(s.num_tokens + slot);
  if (w == 0) return count;
  return count < w ? -1 : token_at(s, slot, count - w);
}

/// Puts word w of a slot, whose words begin at `words`, in its place.
TPSERVE_ROW void take_told(const SlotState& s, int slot, int w, const int32_t* words) {
  const int count = fresh(words);
  if (w == 0) {
    s.num_tokens[slot] = count;
  } else if (count >= w) {
    s.tokens[static_cast<int64_t>(slot) * s.width + count - w] = fresh(words + w);
  }
}

}  // namespace tpserve::cuda
