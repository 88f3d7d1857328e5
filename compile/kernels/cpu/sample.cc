// The next token of each row of logits: grammar mask, penalties and bias, log-probabilities, cuts, and one draw.
//
// Rules for a row (worker/reference_sampler.py is the plain twin):
//   0. Where the slot has a mask, logits of tokens without a bit become -inf.
//   1. logits += bias; logits -= frequency_penalty * count + presence_penalty * (count > 0).
//   2. Log-probabilities are the log-softmax of that.
//   3. temperature 0: the highest logit, the lowest id among equals.
//   4. Otherwise weight(i) = exp((logit(i) - max) / temperature), in float64. Tokens are ranked by logit, then by lower id.
//      top_k keeps the k best; top_p then keeps the shortest prefix of the ranking whose weight reaches top_p of what
//      top_k left; min_p then drops weights below min_p (the best weight is 1).
//   5. A race: token i has an exponential variate e(i) = -ln(1 - v(i)) of its own, and the kept token with the least
//      e(i) / weight(i) wins, the lowest id among equals; it does with probability weight(i) / total.
// v(i) is a word of Philox4x32-10 (Salmon et al., Parallel Random Numbers: As Easy as 1, 2, 3, SC'11), plus a half, times
// 2^-32: word i % 32 / 8, with the slot's seed as key and (position, i / 32 * 8 + i % 8) as counter, so that eight blocks side
// by side serve 32 tokens in order. A draw depends on nothing else. Two models that draw
// with the same numbers agree nearly as often as two draws can: 1 - d of at least (1 - d) / (1 + d) for a total variation d
// (Daliri et al., 2024, arXiv:2408.07978), where a walk along running sums would lose more the flatter the distribution.
//
// The vocabulary is never sorted: candidates are first narrowed by a distance from the best logit, then selected.
#include <algorithm>
#include <functional>
#include <limits>
#include <vector>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "common.h"

namespace tpserve {
namespace {

constexpr int64_t kMaxTop = 20;
constexpr int64_t kSortable = 2048;  // below this a sort is cheaper than another selection

typedef double d8 __attribute__((vector_size(64)));
typedef double d8_unaligned __attribute__((vector_size(64), aligned(8), may_alias));
typedef float f8 __attribute__((vector_size(32)));
typedef float f8_unaligned __attribute__((vector_size(32), aligned(4), may_alias));
typedef int64_t l8 __attribute__((vector_size(64)));

TPSERVE_INLINE d8 splat8(double x) { return d8{x, x, x, x, x, x, x, x}; }

TPSERVE_INLINE double sum_lanes8(d8 x) {
  return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7]));
}

/// exp(x) for x <= 0 within about 1 ulp: reduction by ln 2 in two parts, Taylor to degree 13 on [-ln2/2, ln2/2].
TPSERVE_INLINE d8 exp8(d8 x) {
  const l8 underflow = x < splat8(-708.0);
  x = underflow ? splat8(-708.0) : x;
  const d8 shifter = splat8(6755399441055744.0);  // 1.5 * 2^52: adding it rounds to the nearest integer
  d8 n = x * splat8(1.4426950408889634) + shifter;
  const l8 exponent = reinterpret_cast<l8>(n) - reinterpret_cast<l8>(shifter);
  n = n - shifter;
  const d8 r = (x - n * splat8(6.93147180369123816490e-01)) - n * splat8(1.90821492927058770002e-10);
  d8 p = splat8(1.0 / 6227020800.0);
  constexpr double kFactorials[] = {479001600.0, 39916800.0, 3628800.0, 362880.0, 40320.0, 5040.0, 720.0,
                                    120.0,       24.0,       6.0,       2.0,      1.0,     1.0};
#pragma GCC unroll 13
  for (const double factorial : kFactorials) p = p * r + splat8(1.0 / factorial);
  const d8 scaled = p * reinterpret_cast<d8>((exponent + 1023) << 52);
  return underflow ? d8{} : scaled;
}

/// weights[i] = exp((logits[i] - best) * scale); returns their sum, which has one order. `weights` may be null.
double exponentials(const float* logits, int64_t size, float best, double scale, double* weights) {
  d8 sums = {};
  const d8 shift = splat8(best), factor = splat8(scale);
  int64_t i = 0;
  for (; i + 8 <= size; i += 8) {
    const f8 x = *reinterpret_cast<const f8_unaligned*>(logits + i);
    const d8 e = exp8((__builtin_convertvector(x, d8) - shift) * factor);
    sums += e;
    if (weights != nullptr) *reinterpret_cast<d8_unaligned*>(weights + i) = e;
  }
  double sum = sum_lanes8(sums);
  for (; i < size; ++i) {
    const double e = exp8(splat8((static_cast<double>(logits[i]) - best) * scale))[0];
    sum += e;
    if (weights != nullptr) weights[i] = e;
  }
  return sum;
}

/// A token's place in the ranking as one integer: higher is better, equal logits rank by lower id.
TPSERVE_INLINE uint64_t rank_key(float logit, int64_t id) {
  uint32_t bits;
  const float positive_zero = logit + 0.0f;  // -0 and 0 are equal
  std::memcpy(&bits, &positive_zero, sizeof bits);
  bits = bits & 0x80000000u ? ~bits : bits | 0x80000000u;
  return static_cast<uint64_t>(bits) << 32 | (0xffffffffu - static_cast<uint32_t>(id));
}

TPSERVE_INLINE int32_t id_of(uint64_t key) { return static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(key)); }

/// Highest logit; NaN if there is one anywhere.
float maximum(const float* logits, int64_t size) {
  v16 best = splat(-std::numeric_limits<float>::infinity());
  i16 bad = {};
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) {
    const v16 x = load(logits + i);
    bad |= x != x;
    best = x > best ? x : best;
  }
  float top = max_lanes(best);
  for (int lane = 0; lane < kLanes; ++lane) {
    if (bad[lane] != 0) return std::numeric_limits<float>::quiet_NaN();
  }
  for (; i < size; ++i) {
    if (logits[i] != logits[i]) return logits[i];
    top = logits[i] > top ? logits[i] : top;
  }
  return top;
}

typedef uint64_t u64x8 __attribute__((vector_size(64)));

/// Products of the lower halves of x with a factor.
TPSERVE_INLINE u64x8 multiply_lower(u64x8 x, uint32_t factor) {
#if defined(__AVX512F__)
  return reinterpret_cast<u64x8>(_mm512_mul_epu32(reinterpret_cast<__m512i>(x), _mm512_set1_epi64(factor)));
#else
  return (x & 0xFFFFFFFFull) * static_cast<uint64_t>(factor);
#endif
}

/// The random numbers of one draw.
struct Numbers {
  static constexpr int64_t kGroup = 32;
  uint64_t seed, position;

  /// v of tokens [first, first + 32), `first` a multiple of 32. Upper halves of the state hold what nobody reads.
  TPSERVE_INLINE void group(int64_t first, d8* v) const {
    u64x8 x0 = u64x8{} + (position & 0xFFFFFFFFull), x1 = u64x8{} + (position >> 32);
    u64x8 x2 = u64x8{0, 1, 2, 3, 4, 5, 6, 7} + static_cast<uint64_t>(first / kGroup * 8), x3 = {};
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const u64x8 a = multiply_lower(x0, 0xD2511F53u), b = multiply_lower(x2, 0xCD9E8D57u);
      x0 = (b >> 32) ^ x1 ^ static_cast<uint64_t>(key0);
      x2 = (a >> 32) ^ x3 ^ static_cast<uint64_t>(key1);
      x1 = b, x3 = a;
      key0 += 0x9E3779B9u, key1 += 0xBB67AE85u;
    }
    const u64x8 words[4] = {x0, x1, x2, x3};
    for (int k = 0; k < 4; ++k) {
      const l8 lower = reinterpret_cast<l8>(words[k] & 0xFFFFFFFFull);
      v[k] = (__builtin_convertvector(lower, d8) + splat8(0.5)) * splat8(0x1p-32);
    }
  }
};

/// How one slot samples.
struct Rule {
  float temperature, top_p, min_p;
  int32_t top_k;
};

/// Draws from one row; keeps its buffers between rows.
class Drawer {
 public:
  int32_t draw(const float* logits, int64_t size, float best, const Rule& rule, const Numbers& numbers) {
    weights_.resize(static_cast<size_t>(size));
    const double scale = 1.0 / static_cast<double>(rule.temperature);
    const double total = exponentials(logits, size, best, scale, weights_.data());
    const bool cuts_k = rule.top_k > 0 && rule.top_k < size, cuts_p = rule.top_p < 1.0f;
    if (!cuts_k && !cuts_p && rule.min_p <= 0.0f) return race_all(size, numbers);
    ids_.clear();
    if (cuts_k || cuts_p) {
      gather(logits, size, best, rule, cuts_k, total);
      keep_prefix(cut(rule, cuts_k, cuts_p, total), size, logits);
    } else {
      for (int64_t i = 0; i < size; ++i) {
        if (weights_[i] >= rule.min_p) ids_.push_back(static_cast<int32_t>(i));
      }
    }
    if (rule.min_p > 0.0f) std::erase_if(ids_, [&](int32_t id) { return weights_[id] < rule.min_p; });
    return race_kept(numbers);
  }

 private:
  /// Collects the keys of the tokens near the best until they must hold all that the cuts can keep.
  void gather(const float* logits, int64_t size, float best, const Rule& rule, bool cuts_k, double total) {
    constexpr double kAll = std::numeric_limits<double>::infinity();
    for (const double distance : {5.0, 8.0, 11.0, 15.0, 20.0, kAll}) {  // in temperatures
      const float low = static_cast<float>(best - distance * rule.temperature);
      keys_.clear();
      double held = 0.0;
      for (int64_t i = 0; i < size; ++i) {
        if (logits[i] >= low) {
          keys_.push_back(rank_key(logits[i], i));
          held += weights_[i];
        }
      }
      // The margin is far above rounding, so the running sum in ranked order reaches its target as well.
      const bool enough = cuts_k ? static_cast<int64_t>(keys_.size()) >= rule.top_k
                                 : held >= rule.top_p * total * (1.0 + 1e-9);
      if (enough) return;
    }
  }

  /// Reorders keys so that the kept ones come first, in any order; returns their number.
  int64_t cut(const Rule& rule, bool cuts_k, bool cuts_p, double total) {
    auto end = static_cast<int64_t>(keys_.size());
    if (cuts_k && rule.top_k < end) {
      end = rule.top_k;
      std::nth_element(keys_.begin(), keys_.begin() + end - 1, keys_.end(), std::greater<>());
    }
    if (!cuts_p) return end;
    if (cuts_k) total = sum_of(0, end);
    const double target = rule.top_p * total;
    double before = 0.0;
    int64_t begin = 0;
    while (end - begin > kSortable) {
      const int64_t middle = begin + (end - begin) / 2;
      std::nth_element(keys_.begin() + begin, keys_.begin() + middle, keys_.begin() + end, std::greater<>());
      const double upper = sum_of(begin, middle);
      if (before + upper >= target) {
        end = middle;
      } else {
        before += upper;
        begin = middle;
      }
    }
    std::sort(keys_.begin() + begin, keys_.begin() + end, std::greater<>());
    while (begin < end) {
      before += weights_[id_of(keys_[begin++])];
      if (before >= target) break;
    }
    return std::max<int64_t>(begin, 1);
  }

  double sum_of(int64_t begin, int64_t end) const {
    double sum = 0.0;
    for (int64_t i = begin; i < end; ++i) sum += weights_[id_of(keys_[i])];
    return sum;
  }

  /// ids_ = ids of the first `count` keys, ascending.
  void keep_prefix(int64_t count, int64_t size, const float* logits) {
    if (count > kSortable) {
      const uint64_t lowest = *std::min_element(keys_.begin(), keys_.begin() + count);
      for (int64_t i = 0; i < size; ++i) {
        if (rank_key(logits[i], i) >= lowest) ids_.push_back(static_cast<int32_t>(i));
      }
      return;
    }
    for (int64_t i = 0; i < count; ++i) ids_.push_back(id_of(keys_[i]));
    std::sort(ids_.begin(), ids_.end());
  }

  /// Who leads a race; entrants come in ascending id.
  struct Race {
    double best = std::numeric_limits<double>::infinity();
    int32_t id = 0;

    TPSERVE_INLINE void enter(int64_t token, double v, double weight) {
      if (!(v < weight * best)) return;  // -ln(1 - v) is no less than v
      const double score = -std::log1p(-v) / weight;
      if (score < best) best = score, id = static_cast<int32_t>(token);
    }
  };

  int32_t race_kept(const Numbers& numbers) const {
    Race race;
    d8 v[4];
    int64_t held = -1;
    for (const int32_t id : ids_) {
      const int64_t place = id % Numbers::kGroup, first = id - place;
      if (first != held) numbers.group(first, v);
      held = first;
      race.enter(id, v[place / 8][place % 8], weights_[id]);
    }
    return race.id;
  }

  int32_t race_all(int64_t size, const Numbers& numbers) const {
    Race race;
    d8 v[4];
    for (int64_t first = 0; first < size; first += Numbers::kGroup) {
      numbers.group(first, v);
      const double* weights = weights_.data() + first;
      const int64_t count = std::min(Numbers::kGroup, size - first);
      if (count == Numbers::kGroup && !has_chance(v, weights, race.best)) continue;
      for (int64_t i = 0; i < count; ++i) race.enter(first + i, v[i / 8][i % 8], weights[i]);
    }
    return race.id;
  }

  /// Whether one of 32 tokens may win: after the first few groups hardly one does.
  static bool has_chance(const d8* v, const double* weights, double best) {
    l8 any = {};
    for (int k = 0; k < 4; ++k) any |= v[k] < *reinterpret_cast<const d8_unaligned*>(weights + 8 * k) * splat8(best);
    int64_t chance = 0;
    for (int lane = 0; lane < 8; ++lane) chance |= any[lane];
    return chance != 0;
  }

  std::vector<double> weights_;
  std::vector<uint64_t> keys_;
  std::vector<int32_t> ids_;
};

/// The `count` best tokens of a row, best first.
void best_tokens(const float* logits, int64_t size, int64_t count, uint64_t* best) {
  int64_t held = 0;
  float threshold = 0.0f;
  for (int64_t i = 0; i < size; ++i) {
    // Ids ascend, so a token equal to the worst one held ranks below it.
    if (held == count && !(logits[i] > threshold)) continue;
    const uint64_t key = rank_key(logits[i], i);
    int64_t place = held < count ? held++ : count - 1;
    for (; place > 0 && best[place - 1] < key; --place) best[place] = best[place - 1];
    best[place] = key;
    threshold = logits[id_of(best[held - 1])];
  }
}

struct State {
  const float *temperature, *top_p, *min_p, *frequency, *presence, *bias_values;
  const int32_t *top_k, *bias_ids, *bias_count, *num_logprobs;
  const int64_t* seed;
  int32_t* counts;           // null without penalties
  const int32_t* masks;      // bit i % 32 of word i / 32: token i is allowed
  const int32_t* mask_rows;  // by slot; -1: all are
  int64_t num_slots, max_bias, vocab_size, num_masks;

  int64_t mask_words() const { return (vocab_size + 31) / 32; }

  bool has_penalties(int64_t slot) const { return frequency[slot] != 0.0f || presence[slot] != 0.0f; }
};

void apply_mask(const int32_t* mask, float* logits, int64_t size) {
  constexpr float kNever = -std::numeric_limits<float>::infinity();
  for (int64_t begin = 0; begin < size; begin += 32) {
    const uint32_t word = static_cast<uint32_t>(mask[begin / 32]);
    const int64_t count = std::min<int64_t>(32, size - begin);
    if (word == 0) {
      std::fill_n(logits + begin, count, kNever);
    } else if (word != ~0u) {
      for (int64_t i = 0; i < count; ++i) {
        if ((word >> i & 1u) == 0) logits[begin + i] = kNever;
      }
    }
  }
}

void adjust(const State& state, int64_t slot, float* logits) {
  if (const int32_t row = state.mask_rows[slot]; row >= 0) {
    apply_mask(state.masks + row * state.mask_words(), logits, state.vocab_size);
  }
  for (int64_t i = 0; i < state.bias_count[slot]; ++i) {
    logits[state.bias_ids[slot * state.max_bias + i]] += state.bias_values[slot * state.max_bias + i];
  }
  if (!state.has_penalties(slot)) return;
  const float frequency = state.frequency[slot], presence = state.presence[slot];
  const int32_t* counts = state.counts + slot * state.vocab_size;
  for (int64_t i = 0; i < state.vocab_size; ++i) {
    logits[i] -= frequency * static_cast<float>(counts[i]) + (counts[i] > 0 ? presence : 0.0f);
  }
}

/// Throws on any slot or parameter that the rows below could not handle.
void check_state(const State& state, const int32_t* slots, int64_t num_rows) {
  check_indices("slots", slots, num_rows, state.num_slots);
  std::vector<bool> seen(static_cast<size_t>(state.num_slots));
  for (int64_t r = 0; r < num_rows; ++r) {
    const int64_t slot = slots[r];
    if (seen[slot]) TVM_FFI_THROW(ValueError) << "slot " << slot << " has more than one row";
    seen[slot] = true;
    if (!(state.temperature[slot] >= 0.0f)) {
      TVM_FFI_THROW(ValueError) << "temperature of slot " << slot << " is " << state.temperature[slot]
                                << ", expected 0 or more";
    }
    if (!(state.min_p[slot] <= 1.0f)) {
      TVM_FFI_THROW(ValueError) << "min_p of slot " << slot << " is " << state.min_p[slot] << ", expected at most 1";
    }
    if (state.has_penalties(slot) && state.counts == nullptr) {
      TVM_FFI_THROW(ValueError) << "slot " << slot << " has penalties, but output_counts has no rows";
    }
    if (state.num_logprobs[slot] > kMaxTop) {
      TVM_FFI_THROW(ValueError) << "slot " << slot << " asks for " << state.num_logprobs[slot] << " log-probabilities, at most "
                                << kMaxTop << " are kept";
    }
    if (state.bias_count[slot] < 0 || state.bias_count[slot] > state.max_bias) {
      TVM_FFI_THROW(ValueError) << "bias_count of slot " << slot << " is " << state.bias_count[slot] << ", expected 0 to "
                                << state.max_bias;
    }
    if (state.mask_rows[slot] < -1 || state.mask_rows[slot] >= state.num_masks) {
      TVM_FFI_THROW(ValueError) << "mask_rows of slot " << slot << " is " << state.mask_rows[slot] << ", expected -1 to "
                                << state.num_masks - 1;
    }
    check_indices("bias_ids of a slot", state.bias_ids + slot * state.max_bias, state.bias_count[slot], state.vocab_size);
  }
}

void sample(TensorView logits, int64_t vocab_size, TensorView slots, TensorView positions, TensorView temperature,
            TensorView top_p, TensorView top_k, TensorView min_p, TensorView frequency_penalty,
            TensorView presence_penalty, TensorView seed, TensorView bias_ids, TensorView bias_values,
            TensorView bias_count, TensorView output_counts, TensorView num_logprobs, TensorView masks,
            TensorView mask_rows, TensorView out_ids, TensorView out_logprob, TensorView out_top_ids,
            TensorView out_top_logprobs) {
  check_rank("logits", logits, 2);
  check_rank("masks", masks, 2);
  check_rank("temperature", temperature, 1);
  check_rank("bias_ids", bias_ids, 2);
  check_rank("output_counts", output_counts, 2);
  const int64_t num_rows = logits.size(0), width = logits.size(1), num_slots = temperature.size(0);
  const int64_t max_bias = bias_ids.size(1);
  if (vocab_size < 1 || vocab_size > width) {
    TVM_FFI_THROW(ValueError) << "vocab_size is " << vocab_size << ", expected 1 to " << width;
  }
  float* rows = checked<float>("logits", logits, {num_rows, width});
  const int32_t* slot_of = checked<int32_t>("slots", slots, {num_rows});
  const int32_t* position = checked<int32_t>("positions", positions, {num_rows});
  const bool has_counts = output_counts.size(0) != 0;
  int32_t* counts = checked<int32_t>("output_counts", output_counts, {has_counts ? num_slots : 0, vocab_size});
  const State state{checked<float>("temperature", temperature, {num_slots}),
                    checked<float>("top_p", top_p, {num_slots}),
                    checked<float>("min_p", min_p, {num_slots}),
                    checked<float>("frequency_penalty", frequency_penalty, {num_slots}),
                    checked<float>("presence_penalty", presence_penalty, {num_slots}),
                    checked<float>("bias_values", bias_values, {num_slots, max_bias}),
                    checked<int32_t>("top_k", top_k, {num_slots}),
                    checked<int32_t>("bias_ids", bias_ids, {num_slots, max_bias}),
                    checked<int32_t>("bias_count", bias_count, {num_slots}),
                    checked<int32_t>("num_logprobs", num_logprobs, {num_slots}),
                    checked<int64_t>("seed", seed, {num_slots}),
                    has_counts ? counts : nullptr,
                    checked<int32_t>("masks", masks, {masks.size(0), (vocab_size + 31) / 32}),
                    checked<int32_t>("mask_rows", mask_rows, {num_slots}),
                    num_slots,
                    max_bias,
                    vocab_size,
                    masks.size(0)};
  int32_t* ids = checked<int32_t>("out_ids", out_ids, {num_rows});
  float* logprob = checked<float>("out_logprob", out_logprob, {num_rows});
  int32_t* top_ids = checked<int32_t>("out_top_ids", out_top_ids, {num_rows, kMaxTop});
  float* top_logprobs = checked<float>("out_top_logprobs", out_top_logprobs, {num_rows, kMaxTop});
  check_state(state, slot_of, num_rows);

  parallel_pieces(num_rows, 1, num_threads(num_rows * vocab_size * 8, num_rows), [&](int64_t r_begin, int64_t r_end) {
    for (int64_t r = r_begin; r < r_end; ++r) {
      static thread_local Drawer drawer;
      float* row = rows + r * width;
      const int64_t slot = slot_of[r];
      adjust(state, slot, row);
      const float best = maximum(row, vocab_size);
      if (!std::isfinite(best)) {
        ids[r] = -1;  // thrown for below: an exception must not leave the parallel region
        continue;
      }
      if (state.temperature[slot] == 0.0f) {
        ids[r] = static_cast<int32_t>(std::find(row, row + vocab_size, best) - row);
      } else {
        const Rule rule{state.temperature[slot], state.top_p[slot], state.min_p[slot], state.top_k[slot]};
        const Numbers numbers{static_cast<uint64_t>(state.seed[slot]), static_cast<uint64_t>(position[r])};
        ids[r] = drawer.draw(row, vocab_size, best, rule, numbers);
      }
      const int64_t num_top = std::min<int64_t>(state.num_logprobs[slot], vocab_size);
      logprob[r] = std::numeric_limits<float>::quiet_NaN();
      std::fill_n(top_ids + r * kMaxTop, kMaxTop, -1);
      std::fill_n(top_logprobs + r * kMaxTop, kMaxTop, -std::numeric_limits<float>::infinity());
      if (num_top < 0) continue;
      const double log_total = std::log(exponentials(row, vocab_size, best, 1.0, nullptr));
      logprob[r] = static_cast<float>(static_cast<double>(row[ids[r]]) - best - log_total);
      uint64_t keys[kMaxTop];
      if (num_top > 0) best_tokens(row, vocab_size, num_top, keys);
      for (int64_t i = 0; i < num_top; ++i) {
        top_ids[r * kMaxTop + i] = id_of(keys[i]);
        top_logprobs[r * kMaxTop + i] = static_cast<float>(static_cast<double>(row[id_of(keys[i])]) - best - log_total);
      }
    }
  });
  for (int64_t r = 0; r < num_rows; ++r) {
    if (ids[r] < 0) {
      TVM_FFI_THROW(ValueError) << "logits of slot " << slot_of[r] << " at position " << position[r]
                                << " have a NaN or no finite maximum";
    }
  }
  for (int64_t r = 0; r < num_rows; ++r) {
    if (state.has_penalties(slot_of[r])) ++counts[slot_of[r] * vocab_size + ids[r]];
  }
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(sample, sample);

}  // namespace
}  // namespace tpserve
