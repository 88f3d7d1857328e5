// How a block drafts by suffixes: the walk of worker/proposers/suffix.py, whose draft tokens these must be, over text that
// stands on the device. Compiles on the host too, where tests run it with threads of their own.
//
// A slot's text is that of the sequences that have left, each behind a -1, then a -1 and its own tokens. A place is where
// the longest run of last tokens ended before. With every draft token those places go on of which it is the next one.
// A thread of a team of n has the places rank, rank + n, ...: it alone reads and writes their marks, one bit each, so the
// marks need no atomics, neighbours read neighbouring tokens, and a team that has few places left walks fast.
#pragma once

#include "speculation_rows.cuh"

#ifdef __CUDACC__
#define TPSERVE_TEAM __device__ __forceinline__
#else
#define TPSERVE_TEAM inline
#endif

namespace tpserve::cuda {

// As in suffix.py, where they are explained.
constexpr int kMaxRun = 32;
constexpr int kTokensPerLength = 2;
constexpr double kMinLikelihood = 0.1;

constexpr int kMaxLikely = 10;  // tokens that can each follow a tenth of all places
constexpr int kDigitBits = 8, kNumDigits = 1 << kDigitBits;

/// Tokens of sequences that have left, each sequence behind a -1: a ring. All int32.
struct Earlier {
  int32_t* tokens;  // (capacity,)
  int32_t* held;    // (2,): where the next token goes, and how many are held
  int capacity;
};

/// Values of which each is what likely follows, or the low digits of it.
struct LikelyValues {
  int32_t size;
  uint32_t values[kMaxLikely];
  int32_t counts[kMaxLikely];
};

/// What a team shares, beside its marks.
struct SuffixScratch {
  int32_t tail[kMaxRun];  // last tokens of the text, the very last first
  LikelyValues likely[2];
  int32_t counts[kMaxLikely * kNumDigits];
};

/// What a slot is drafted from; position 0 is that of the oldest token.
struct Text {
  const int32_t* earlier;
  const int32_t* own;
  int capacity, first, num_earlier, size;

  TPSERVE_ROW int32_t at(int position) const {
    const int place = first + position;
    const int32_t token = fresh(position > num_earlier ? own + (position - num_earlier - 1)
                                                       : earlier + (place < capacity ? place : place - capacity));
    return position == num_earlier ? -1 : token;  // read all the same: without a branch, loads overlap
  }
};

TPSERVE_ROW Text text_of(const SlotState& s, const Earlier& earlier, int slot) {
  const int num_earlier = fresh(earlier.held + 1), first = fresh(earlier.held) - num_earlier;
  return {earlier.tokens, s.tokens + static_cast<int64_t>(slot) * s.width, earlier.capacity,
          first < 0 ? first + earlier.capacity : first, num_earlier, num_earlier + 1 + fresh(s.num_tokens + slot)};
}

/// Draft tokens that a slot is given at most: none before its prompt has run, or where it may not speculate.
TPSERVE_ROW int suffix_limit(const SlotState& s, int slot, int num_drafts) {
  if (fresh(s.max_len + slot) <= 0 || fresh(s.num_tokens + slot) < 1) return 0;
  const int room = draft_room(s, slot);
  return room < num_drafts ? room : num_drafts;
}

/// Words of marks that each thread of a team has.
TPSERVE_ROW int words_of_marks(int text_size, int team_size) { return (text_size + 32 * team_size - 1) / (32 * team_size); }

TPSERVE_ROW int lowest_bit(uint32_t bits) {
#ifdef __CUDA_ARCH__
  return __ffs(static_cast<int>(bits)) - 1;
#else
  return __builtin_ctz(bits);
#endif
}

/// How many of the text's last tokens, 0 to kMaxRun, end at position `end` as well, which is before the text's own end.
TPSERVE_ROW int run_length(const Text& text, const int32_t* tail, int end) {
  constexpr int kAtOnce = 8;  // loads that need not wait for each other
  for (int first = 0; first < kMaxRun; first += kAtOnce) {
    int32_t tokens[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) tokens[i] = first + i <= end ? text.at(end - first - i) : -1;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i > end || tokens[i] != tail[first + i]) return first + i;
    }
  }
  return kMaxRun;
}

/// Marks where the longest run of last tokens ended before, and returns its length; 0 if there is none.
template <typename Team>
TPSERVE_TEAM int mark_runs(const Team& team, const Text& text, SuffixScratch& shared, uint32_t* marks, int num_words) {
  for (int i = team.rank(); i < kMaxRun && i < text.size; i += team.size()) shared.tail[i] = text.at(text.size - 1 - i);
  team.sync();
  constexpr int kAtOnce = 8;
  const int num_ends = text.size - 1;
  int best = 0, since = 0;  // this thread's longest run, and the first word in which marks are of that length
  for (int word = 0; word < num_words; ++word) {
    uint32_t marked = 0;
    for (int first = 0; first < 32; first += kAtOnce) {
      const int begin = (word * 32 + first) * team.size() + team.rank();
      if (begin >= num_ends) break;
      int32_t tokens[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int end = begin + i * team.size();
        tokens[i] = text.at(end < num_ends ? end : num_ends);
      }
#pragma unroll 1
      for (int i = 0; i < kAtOnce; ++i) {
        const int end = begin + i * team.size();
        if (end >= num_ends || tokens[i] != shared.tail[0]) continue;
        const int length = run_length(text, shared.tail, end);
        if (length > best) best = length, marked = 0, since = word;
        if (length == best) marked |= 1u << (first + i);
      }
    }
    marks[word * team.size() + team.rank()] = marked;
  }
  const int longest = team.max(best);
  for (int word = 0; word < num_words; ++word) {
    if (best < longest || word < since) marks[word * team.size() + team.rank()] = 0;
  }
  return longest;
}

/// Asks `keeps` about each marked place of this thread, ascending; a place about which it says false loses its mark.
template <typename Team, typename Keeps>
TPSERVE_TEAM void filter_places(const Team& team, uint32_t* marks, int num_words, Keeps keeps) {
  for (int word = 0; word < num_words; ++word) {
    uint32_t& own = marks[word * team.size() + team.rank()];
    const uint32_t marked = own;
    uint32_t kept = marked;
    for (uint32_t left = marked; left != 0; left &= left - 1) {
      const int bit = lowest_bit(left);
      if (!keeps((word * 32 + bit) * team.size() + team.rank())) kept &= ~(1u << bit);
    }
    own = kept;
  }
}

/// Which of `likely` has these low digits; -1 for none.
TPSERVE_ROW int find_value(const LikelyValues& likely, uint32_t value) {
  for (int i = 0; i < likely.size; ++i) {
    if (likely.values[i] == value) return i;
  }
  return -1;
}

/// The token that most often stands `ahead` of the marked places, `num_places`, of equals the one that came last: where it
/// does so last, and in `count` how often; -1 where even it is too unlikely.
///
/// Exact and bounded, whatever the tokens: they are counted by one digit after the other, the low one first, and only what
/// may still be a likely token's is followed, which ten values at most are. No token that is lost could have been drafted.
template <typename Team>
TPSERVE_TEAM int find_most_frequent(const Team& team, const Text& text, SuffixScratch& shared, uint32_t* marks,
                                    int num_words, int ahead, int num_places, double likelihood, int* count) {
  if (team.rank() == 0) shared.likely[0].size = 1, shared.likely[0].values[0] = 0;  // of no digits
  for (int level = 0; level < 32 / kDigitBits; ++level) {
    const LikelyValues& known = shared.likely[level % 2];
    LikelyValues& found = shared.likely[(level + 1) % 2];
    const int shift = level * kDigitBits;
    const uint32_t low = (1u << shift) - 1;
    team.sync();  // `known` is complete, and nobody reads the counts and `found` any more
    const int num_counts = known.size * kNumDigits;
    for (int i = team.rank(); i < num_counts; i += team.size()) shared.counts[i] = 0;
    if (team.rank() == 0) found.size = 0;
    team.sync();
    int at = -1, times = 0;  // the same count often follows itself: of it one sum is added
    filter_places(team, marks, num_words, [&](int place) {
      const uint32_t value = static_cast<uint32_t>(text.at(place + ahead));
      const int which = find_value(known, value & low);
      if (which < 0) return true;
      const int own = which * kNumDigits + static_cast<int>((value >> shift) % kNumDigits);
      if (own != at) {
        if (times > 0) team.add(shared.counts + at, times);
        at = own, times = 0;
      }
      ++times;
      return true;
    });
    if (times > 0) team.add(shared.counts + at, times);
    team.sync();
    for (int i = team.rank(); i < num_counts; i += team.size()) {
      const int sum = shared.counts[i];
      if (sum == 0 || likelihood * (static_cast<double>(sum) / num_places) < kMinLikelihood) continue;
      const int place = team.add(&found.size, 1);
      found.values[place] = known.values[i / kNumDigits] | static_cast<uint32_t>(i % kNumDigits) << shift;
      found.counts[place] = sum;
    }
  }
  team.sync();
  const LikelyValues& likely = shared.likely[0];
  int most = 0;
  for (int i = 0; i < likely.size; ++i) most = likely.counts[i] > most ? likely.counts[i] : most;
  int last = -1;
  filter_places(team, marks, num_words, [&](int place) {
    const int which = find_value(likely, static_cast<uint32_t>(text.at(place + ahead)));
    if (which >= 0 && likely.counts[which] == most) last = place + ahead;
    return true;
  });
  *count = most;
  return team.max(last);
}

/// All draft tokens of a slot. `marks`: (words_of_marks, team's size), shared.
template <typename Team>
TPSERVE_TEAM void draft_by_suffix(const Team& team, const SlotState& s, const Earlier& earlier, int slot, int num_drafts,
                                  SuffixScratch& shared, uint32_t* marks) {
  int32_t* out = s.draft_tokens + static_cast<int64_t>(slot) * s.max_drafts;
  const int limit = suffix_limit(s, slot, num_drafts);
  int drafted = 0;
  if (limit > 0) {
    const Text text = text_of(s, earlier, slot);
    const int num_words = words_of_marks(text.size, team.size());
    const int length = mark_runs(team, text, shared, marks, num_words);
    const int most = limit < kTokensPerLength * length ? limit : kTokensPerLength * length;
    double likelihood = 1.0;
    for (int32_t token = -1; drafted < most; ++drafted) {
      const int ahead = 1 + drafted;
      int own = 0, last = -1;
      filter_places(team, marks, num_words, [&](int place) {
        if (place + ahead >= text.size || (drafted > 0 && text.at(place + drafted) != token)) return false;
        ++own, last = place + ahead;
        return true;
      });
      const int num_places = team.sum(own);
      if (num_places == 0) break;
      int count = 1;
      // One place is the most frequent case by far.
      const int next = num_places == 1 ? team.max(last)
                                       : find_most_frequent(team, text, shared, marks, num_words, ahead, num_places,
                                                            likelihood, &count);
      if (next < 0) break;
      token = text.at(next);
      likelihood *= static_cast<double>(count) / num_places;
      if (token < 0 || likelihood < kMinLikelihood) break;
      if (team.rank() == 0) out[drafted] = token;
    }
  }
  for (int i = drafted + team.rank(); i < num_drafts; i += team.size()) out[i] = -1;
}

/// Keeps the tokens of a sequence that leaves its slot, if all of them stand there; the oldest make room.
template <typename Team>
TPSERVE_TEAM void keep_sequence(const Team& team, const SlotState& s, const Earlier& earlier, int slot) {
  const int num_tokens = fresh(s.num_tokens + slot);
  if (fresh(s.max_len + slot) <= 0 || num_tokens < 1) return;
  const int next = fresh(earlier.held), held = fresh(earlier.held + 1), count = 1 + num_tokens;
  for (int i = team.rank() + (count > earlier.capacity ? count - earlier.capacity : 0); i < count; i += team.size()) {
    earlier.tokens[(next + i) % earlier.capacity] = i == 0 ? -1 : token_at(s, slot, i - 1);
  }
  team.sync();  // everyone has read what is held
  if (team.rank() == 0) {
    earlier.held[0] = (next + count) % earlier.capacity;
    earlier.held[1] = held + count < earlier.capacity ? held + count : earlier.capacity;
  }
}

}  // namespace tpserve::cuda
