// The next token of each row of logits, by the rules of the CPU's `sample` (worker/reference_sampler.py is the plain twin):
//   0. Where the slot has a grammar mask, logits of tokens without a bit become -inf.
//   1. logits += bias; logits -= frequency_penalty * count + presence_penalty * (count > 0).
//   2. Log-probabilities are the log-softmax of that.
//   3. temperature 0: the highest logit, the lowest id among equals.
//   4. Otherwise weight(i) = exp((logit(i) - max) / temperature). Tokens are ranked by logit, then by lower id. top_k keeps
//      the k best; top_p then the shortest prefix of the ranking whose weight reaches top_p of what top_k left; min_p then
//      drops weights below min_p.
//   5. A race: the kept token with the least e(i) / weight(i), the lowest id among equals, with e(i) = -ln(1 - v(i)) and
//      v(i) = (word i % 32 / 8 of Philox4x32-10, key: seed, counter: (position, i / 32 * 8 + i % 8), plus a half) / 2^32.
//
// One block per row. Weights are float32 exponentials in units of 2^-44, so their sums are integers: the same whatever the
// order of adding, on every rank. Cuts are found by sorting the candidates near the best logit where they are few, and else
// by radix selection on the bits of the logits, three passes of 2048 bins. Rows with slot -1 are padding and skipped. A row
// without a finite maximum, or with a NaN, gets id -1.
#include <cfloat>

#include "common.cuh"

namespace tpserve::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = 2048;
constexpr int kMaxTop = 20;
constexpr int kCandidates = 2048;  // sorted in shared memory
constexpr int kSegments = 128;     // of a row, for searches by running sum
constexpr int kDistances = 6;      // trial bounds of candidates
constexpr float kUnit = 17592186044416.0f;  // 2^44: weights of 2^18 tokens fit in 64 bits

using Sum = unsigned long long;

struct SampleParams {
  const void* logits;  // (R, width) float32 or bfloat16
  float* adjusted;     // (R, width); rows with a mask, bias or penalties are worked on here
  const int32_t *slots, *positions;
  const float *temperature, *top_p, *min_p, *frequency, *presence, *bias_values;
  const int32_t *top_k, *bias_ids, *bias_count, *num_logprobs;
  const int64_t* seed;
  int32_t* counts;           // null: no slot has penalties
  const int32_t* masks;      // (M, words); bit i % 32 of word i / 32: token i is allowed
  const int32_t* mask_rows;  // by slot; -1: all are
  int32_t *out_ids, *out_top_ids;
  float *out_logprob, *out_top_logprobs;
  int width, vocab_size, max_bias, num_slots, num_masks;
};

/// Orders as the logit does.
__device__ __forceinline__ uint32_t order_key(float logit) {
  const uint32_t bits = __float_as_uint(logit + 0.0f);  // -0 and 0 are equal
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float logit_of_key(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key);
}

template <typename T>
struct RowView {
  const T* data;
  __device__ __forceinline__ float operator[](int i) const { return static_cast<float>(data[i]); }
};

/// Calls visit(i, logit) for this thread's share of the tokens [begin, end), several loads in flight.
template <typename T, typename Visit>
__device__ __forceinline__ void for_each(const RowView<T>& row, int begin, int end, Visit&& visit) {
  constexpr int kBatch = 8;
  for (int first = begin; first < end; first += kThreads * kBatch) {
    float logits[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = first + j * kThreads + static_cast<int>(threadIdx.x);
      if (i < end) logits[j] = row[i];
    }
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int i = first + j * kThreads + static_cast<int>(threadIdx.x);
      if (i < end) visit(i, logits[j]);
    }
  }
}

struct Scratch {
  union {
    Sum bins[kBins];
    Sum candidates[kCandidates];
  };
  Sum warp_sums[kWarps];
  Sum selected_sum, selected_bin_sum;
  int selected_bin;
  Sum reduce64[32];
  double reduce_double[32];
  Sum segments[kSegments];
  Sum trial_weight[kDistances];
  int trial_count[kDistances];
  int found, num_candidates;
  int top_count;
  Sum top_keys[kMaxTop];
};

/// Four words of Philox4x32-10.
__device__ __forceinline__ void philox(uint64_t seed, uint64_t position, uint32_t block, uint32_t (&x)[4]) {
  x[0] = static_cast<uint32_t>(position), x[1] = static_cast<uint32_t>(position >> 32), x[2] = block, x[3] = 0;
  uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)};
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = 0xD2511F53ull * x[0], b = 0xCD9E8D57ull * x[2];
    const uint32_t next[4] = {static_cast<uint32_t>(b >> 32) ^ x[1] ^ key[0], static_cast<uint32_t>(b),
                              static_cast<uint32_t>(a >> 32) ^ x[3] ^ key[1], static_cast<uint32_t>(a)};
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = next[i];
    key[0] += 0x9E3779B9u;
    key[1] += 0xBB67AE85u;
  }
}

__device__ __forceinline__ Sum weight_of(float logit, float best, float inverse_temperature) {
  return __float2ull_rn(expf((logit - best) * inverse_temperature) * kUnit);
}

/// Inclusive sums over the block in thread order.
__device__ Sum block_scan(Sum value, Scratch& s) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int offset = 1; offset < 32; offset *= 2) {
    const Sum other = __shfl_up_sync(~0u, value, offset);
    if (lane >= offset) value += other;
  }
  __syncthreads();
  if (lane == 31) s.warp_sums[warp] = value;
  __syncthreads();
  Sum before = 0;
  for (int w = 0; w < warp; ++w) before += s.warp_sums[w];
  return before + value;
}

/// The tokens ranked above `key`, and the first `ties` with that key by id, are kept.
struct Cut {
  uint32_t key;
  Sum ties;
};

/// Finds the key at which the measure of the keys above stays below `target` and with it reaches it. `measure(logit, key)` is
/// zero for tokens that do not count; `extra` is added at `extra_key`. `above` receives the measure of all keys above.
template <typename T, typename Measure>
__device__ uint32_t select_key(const RowView<T>& row, int size, Sum target, Measure measure, uint32_t extra_key, Sum extra,
                               Scratch& s, Sum* above) {
  uint32_t prefix = 0, mask = 0;
  Sum passed = 0;
#pragma unroll 1
  for (int shift = 21; shift >= 0; shift = shift == 21 ? 10 : shift == 10 ? 0 : -1) {
    const int bits = shift == 0 ? 10 : 11, bins = 1 << bits;
    for (int i = threadIdx.x; i < kBins; i += kThreads) s.bins[i] = 0;
    __syncthreads();
    for_each(row, 0, size, [&](int, float logit) {
      const uint32_t key = order_key(logit);
      if ((key & mask) != prefix) return;
      const Sum value = measure(logit, key);
      if (value != 0) atomicAdd(&s.bins[key >> shift & (bins - 1)], value);
    });
    if (threadIdx.x == 0 && extra != 0 && (extra_key & mask) == prefix) {
      atomicAdd(&s.bins[extra_key >> shift & (bins - 1)], extra);
    }
    __syncthreads();
    // Thread t has the bins 2 t and 2 t + 1 from the top.
    const int high = kBins - 1 - 2 * threadIdx.x;
    const Sum first = s.bins[high], second = s.bins[high - 1];
    const Sum through = passed + block_scan(first + second, s), before = through - first - second;
    if (threadIdx.x == 0) s.selected_bin = -1;
    __syncthreads();
    if (before < target && through >= target) {
      const bool in_first = before + first >= target;
      s.selected_bin = in_first ? high : high - 1;
      s.selected_sum = in_first ? before : before + first;
    }
    __syncthreads();
    const int bin = s.selected_bin;
    passed = s.selected_sum;
    __syncthreads();
    prefix |= static_cast<uint32_t>(bin) << shift;
    mask |= static_cast<uint32_t>(bins - 1) << shift;
  }
  *above = passed;
  return prefix;
}

/// The lowest id at which the running sum of measure(i, logit), in ascending id, exceeds `limit(total)`; -1 if none does.
template <typename T, typename Measure, typename Limit>
__device__ int find_running(const RowView<T>& row, int size, Measure measure, Limit limit, Scratch& s) {
  // A segment is at most four tokens per thread, for vocabularies up to 2^18 fewer than kSegments of them.
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int length = (size + kSegments - 1) / kSegments;
  for (int segment = warp; segment < kSegments; segment += kWarps) {
    const int begin = min(size, segment * length), end = min(size, begin + length);
    Sum sum = 0;
    for (int first = begin; first < end; first += 32 * 8) {
      float logits[8];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (first + j * 32 + lane < end) logits[j] = row[first + j * 32 + lane];
      }
#pragma unroll
      for (int j = 0; j < 8; ++j) {
        if (first + j * 32 + lane < end) sum += measure(first + j * 32 + lane, logits[j]);
      }
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(~0u, sum, offset);
    if (lane == 0) s.segments[segment] = sum;
  }
  __syncthreads();
  if (threadIdx.x == 0) s.found = -1;
  const Sum mine = threadIdx.x < kSegments ? s.segments[threadIdx.x] : 0;
  const Sum through = block_scan(mine, s);
  __syncthreads();
  Sum total = 0;
  for (int w = 0; w < kWarps; ++w) total += s.warp_sums[w];
  const double bound = limit(total);
  if (mine > 0 && static_cast<double>(through) > bound && static_cast<double>(through - mine) <= bound) {
    s.found = threadIdx.x;
    s.selected_sum = through - mine;
  }
  __syncthreads();
  const int segment = s.found;
  if (segment < 0) return -1;
  const Sum before = s.selected_sum;
  __syncthreads();
  if (threadIdx.x == 0) s.found = -1;
  constexpr int kEach = (1 << 18) / kSegments / kThreads;
  const int begin = segment * length, end = min(size, begin + length);
  Sum values[kEach], sum = 0;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const int i = begin + static_cast<int>(threadIdx.x) * kEach + j;
    values[j] = i < end ? measure(i, row[i]) : 0;
    sum += values[j];
  }
  Sum running = before + block_scan(sum, s) - sum;
#pragma unroll
  for (int j = 0; j < kEach; ++j) {
    const bool was_below = static_cast<double>(running) <= bound;
    running += values[j];
    if (values[j] > 0 && was_below && static_cast<double>(running) > bound) {
      s.found = begin + static_cast<int>(threadIdx.x) * kEach + j;
    }
  }
  __syncthreads();
  const int found = s.found;
  __syncthreads();
  return found;
}

/// The token with the least e(i) / weight(i, logit), of equals the lowest id; -1 if no weight is above zero. Each thread has
/// one Philox block at a time, whose four tokens stand eight apart.
template <typename T, typename Weight>
__device__ int race(const RowView<T>& row, int size, uint64_t seed, uint64_t position, Weight weight, Scratch& s) {
  Sum first = 0;  // complement of (score, id): the largest wins
  for (int block = threadIdx.x; block / 8 * 32 < size; block += kThreads) {
    const int begin = block / 8 * 32 + block % 8;
    float logits[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (begin + 8 * k < size) logits[k] = row[begin + 8 * k];
    }
    Sum weights[4], any = 0;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      weights[k] = begin + 8 * k < size ? weight(begin + 8 * k, logits[k]) : 0;
      any |= weights[k];
    }
    if (any == 0) continue;
    uint32_t words[4];
    philox(seed, position, static_cast<uint32_t>(block), words);
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (weights[k] == 0) continue;
      const float v = fmaf(static_cast<float>(words[k]), 0x1p-32f, 0x1p-33f);
      const float score = -log1pf(-v) / static_cast<float>(weights[k]);  // infinite at v = 1: behind all others
      const Sum place = static_cast<Sum>(__float_as_uint(score)) << 32 | static_cast<uint32_t>(begin + 8 * k);
      first = ~place > first ? ~place : first;
    }
  }
  first = block_reduce(first, Sum{0}, s.reduce64, Max{});
  return first == 0 ? -1 : static_cast<int>(static_cast<uint32_t>(~first));
}

/// How a slot cuts and weighs.
struct Rule {
  float best, inverse_temperature, top_p;
  int top_k;  // 0: all
};

/// Sorts s.candidates, a power of two of them, descending.
__device__ void sort_candidates(int count, Scratch& s) {
  for (int size = 2; size <= count; size *= 2) {
    for (int stride = size / 2; stride > 0; stride /= 2) {
      __syncthreads();
      for (int pair = threadIdx.x; pair < count / 2; pair += kThreads) {
        const int low = pair / stride * stride * 2 + pair % stride, high = low + stride;
        const Sum a = s.candidates[low], b = s.candidates[high];
        if ((a < b) == ((low & size) == 0)) s.candidates[low] = b, s.candidates[high] = a;
      }
    }
  }
  __syncthreads();
}

/// Cuts by sorting the tokens near the best. False if they are too many, or if those near do not hold all that is kept.
template <typename T>
__device__ bool cut_by_sorting(const RowView<T>& row, int size, const Rule& rule, Scratch& s, Cut* cut) {
  constexpr float kDistance[kDistances] = {2.0f, 4.0f, 6.0f, 8.0f, 10.0f, 13.0f};  // in temperatures
  const int lane = threadIdx.x % 32;
  int counts[kDistances] = {};
  Sum weights[kDistances] = {}, total = 0;
  for_each(row, 0, size, [&](int, float logit) {
    const float distance = (rule.best - logit) * rule.inverse_temperature;
    if (distance > 32.0f) return;  // rounds to nothing
    const Sum weight = __float2ull_rn(expf(-distance) * kUnit);
    total += weight;
    if (distance > kDistance[kDistances - 1]) return;
#pragma unroll
    for (int d = 0; d < kDistances; ++d) {
      if (distance <= kDistance[d]) ++counts[d], weights[d] += weight;
    }
  });
  if (threadIdx.x < kDistances) s.trial_count[threadIdx.x] = 0, s.trial_weight[threadIdx.x] = 0;
  total = block_reduce(total, Sum{0}, s.reduce64, Add{});
#pragma unroll
  for (int d = 0; d < kDistances; ++d) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
      counts[d] += __shfl_xor_sync(~0u, counts[d], offset);
      weights[d] += __shfl_xor_sync(~0u, weights[d], offset);
    }
    if (lane == 0) atomicAdd(&s.trial_count[d], counts[d]), atomicAdd(&s.trial_weight[d], weights[d]);
  }
  __syncthreads();
  const double target = static_cast<double>(rule.top_p) * static_cast<double>(total);
  float bound = -1.0f;
  for (int d = kDistances - 1; d >= 0; --d) {
    const bool enough = rule.top_k > 0 ? s.trial_count[d] >= rule.top_k : static_cast<double>(s.trial_weight[d]) >= target;
    if (enough && s.trial_count[d] <= kCandidates) bound = kDistance[d];
  }
  if (bound < 0.0f) return false;
  if (threadIdx.x == 0) s.num_candidates = 0;
  for (int i = threadIdx.x; i < kCandidates; i += kThreads) s.candidates[i] = 0;
  __syncthreads();
  for_each(row, 0, size, [&](int i, float logit) {
    if ((rule.best - logit) * rule.inverse_temperature > bound) return;
    s.candidates[atomicAdd(&s.num_candidates, 1)] =
        static_cast<Sum>(order_key(logit)) << 32 | (0xFFFFFFFFu - static_cast<uint32_t>(i));
  });
  __syncthreads();
  const int held = s.num_candidates;
  int padded = 32;
  while (padded < held) padded *= 2;
  sort_candidates(padded, s);
  int kept = rule.top_k > 0 ? min(rule.top_k, held) : held;
  if (rule.top_p < 1.0f) {
    const int i = 2 * threadIdx.x;
    Sum pair[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float logit = logit_of_key(static_cast<uint32_t>(s.candidates[(i + j) % kCandidates] >> 32));
      pair[j] = i + j < kept ? weight_of(logit, rule.best, rule.inverse_temperature) : 0;
    }
    const Sum through = block_scan(pair[0] + pair[1], s);
    __syncthreads();
    Sum all = 0;
    for (int w = 0; w < kWarps; ++w) all += s.warp_sums[w];
    // Without top_k the target is a share of all tokens, those far away too.
    const double goal = static_cast<double>(rule.top_p) * static_cast<double>(rule.top_k > 0 ? all : total);
    if (threadIdx.x == 0) s.found = kept;
    __syncthreads();
    const Sum first = through - pair[1], before = first - pair[0];
    const bool open = threadIdx.x == 0 || static_cast<double>(before) < goal;
    if (open && static_cast<double>(first) >= goal) {
      atomicMin(&s.found, i + 1);
    } else if (static_cast<double>(first) < goal && static_cast<double>(through) >= goal) {
      atomicMin(&s.found, i + 2);
    }
    __syncthreads();
    kept = max(1, s.found);
  }
  const uint32_t key = static_cast<uint32_t>(s.candidates[kept - 1] >> 32);
  int ties = 0;
  for (int i = threadIdx.x; i < kept; i += kThreads) ties += static_cast<uint32_t>(s.candidates[i] >> 32) == key;
  *cut = {key, block_reduce(static_cast<Sum>(ties), Sum{0}, s.reduce64, Add{})};
  return true;
}

/// The same for any number of candidates.
template <typename T>
__device__ Cut cut_by_selection(const RowView<T>& row, int size, const Rule& rule, Scratch& s) {
  Cut cut{0, 0};  // keeps all: no key is as low as zero
  const auto weight = [&](float logit) { return weight_of(logit, rule.best, rule.inverse_temperature); };
  if (rule.top_k > 0) {
    Sum above;
    cut.key = select_key(row, size, rule.top_k, [](float, uint32_t) { return Sum{1}; }, 0, 0, s, &above);
    cut.ties = static_cast<Sum>(rule.top_k) - above;
  }
  if (!(rule.top_p < 1.0f)) return cut;
  const Sum tied = cut.ties == 0 ? 0 : cut.ties * weight(logit_of_key(cut.key));
  const auto measure = [&](float logit, uint32_t key) { return key > cut.key ? weight(logit) : Sum{0}; };
  Sum total = 0;
  for_each(row, 0, size, [&](int, float logit) { total += measure(logit, order_key(logit)); });
  total = block_reduce(total, Sum{0}, s.reduce64, Add{}) + tied;
  Sum target = static_cast<Sum>(ceil(static_cast<double>(rule.top_p) * static_cast<double>(total)));
  target = target < 1 ? 1 : target > total ? total : target;
  Sum above;
  const uint32_t key = select_key(row, size, target, measure, cut.key, tied, s, &above);
  const Sum one = weight(logit_of_key(key)), ties = one == 0 ? 1 : (target - above + one - 1) / one;
  return {key, key == cut.key && cut.ties < ties ? cut.ties : ties};
}

/// Samples row r from its adjusted logits; `counts` is null without penalties.
template <typename T>
__device__ void sample_row(const SampleParams& p, const RowView<T>& row, int r, int slot, int32_t* counts, Scratch& s) {
  const int size = p.vocab_size;
  // The best token, the lowest id among equals.
  Sum top = 0;
  bool bad = false;
  for_each(row, 0, size, [&](int i, float x) {
    bad |= x != x;
    const Sum key = static_cast<Sum>(order_key(x)) << 32 | (0xFFFFFFFFu - static_cast<uint32_t>(i));
    top = key > top ? key : top;
  });
  bad = __syncthreads_or(bad);
  top = block_reduce(top, Sum{0}, s.reduce64, Max{});
  const float best = logit_of_key(static_cast<uint32_t>(top >> 32));
  int id = static_cast<int>(0xFFFFFFFFu - static_cast<uint32_t>(top));
  if (bad || !(fabsf(best) <= FLT_MAX)) {
    if (threadIdx.x == 0) p.out_ids[r] = -1;
    return;
  }

  const float temperature = p.temperature[slot];
  if (temperature > 0.0f) {
    const int top_k = p.top_k[slot];
    const float min_p = p.min_p[slot];
    const Rule rule{best, 1.0f / temperature, p.top_p[slot], top_k > 0 && top_k < size ? top_k : 0};
    Cut cut{0, 0};
    if ((rule.top_k > 0 || rule.top_p < 1.0f) && !cut_by_sorting(row, size, rule, s, &cut)) {
      cut = cut_by_selection(row, size, rule, s);
    }
    int last_tie = size;  // tokens with the cut's key are kept up to this id
    if (cut.ties > 0) {
      last_tie = find_running(
          row, size, [&](int, float logit) { return order_key(logit) == cut.key ? Sum{1} : Sum{0}; },
          [&](Sum) { return static_cast<double>(cut.ties) - 0.5; }, s);
    }
    const Sum min_weight = min_p > 0.0f ? __float2ull_ru(min_p * kUnit) : 0;
    const auto kept_weight = [&](int i, float logit) {
      const uint32_t key = order_key(logit);
      if (key < cut.key || (key == cut.key && i > last_tie)) return Sum{0};
      const Sum weight = weight_of(logit, best, rule.inverse_temperature);
      return weight >= min_weight ? weight : Sum{0};
    };
    const auto position = static_cast<uint64_t>(p.positions[r]);
    id = race(row, size, static_cast<uint64_t>(p.seed[slot]), position, kept_weight, s);  // the best has a weight
  }
  if (threadIdx.x == 0) p.out_ids[r] = id;

  const int num_top = min(p.num_logprobs[slot], min(size, kMaxTop));
  if (threadIdx.x < kMaxTop) {
    p.out_top_ids[r * kMaxTop + threadIdx.x] = -1;
    p.out_top_logprobs[r * kMaxTop + threadIdx.x] = -INFINITY;
  }
  if (threadIdx.x == 0) p.out_logprob[r] = NAN;
  if (num_top >= 0) {
    double total = 0.0;
    for_each(row, 0, size, [&](int, float logit) { total += static_cast<double>(expf(logit - best)); });
    const double log_total = log(block_reduce(total, 0.0, s.reduce_double, Add{}));
    if (threadIdx.x == 0) p.out_logprob[r] = static_cast<float>(static_cast<double>(row[id]) - best - log_total);
    if (num_top > 0) {
      Sum above;
      const uint32_t key = select_key(row, size, static_cast<Sum>(num_top), [](float, uint32_t) { return Sum{1}; }, 0, 0, s,
                                      &above);
      if (threadIdx.x == 0) s.top_count = 0;
      __syncthreads();
      for (int i = threadIdx.x; i < size; i += kThreads) {
        const uint32_t mine = order_key(row[i]);
        if (mine > key) {
          s.top_keys[atomicAdd(&s.top_count, 1)] = static_cast<Sum>(mine) << 32 | (0xFFFFFFFFu - static_cast<uint32_t>(i));
        }
      }
      __syncthreads();
      if (threadIdx.x < 32) {  // the tied ones by ascending id, then all in order
        int held = s.top_count;
        for (int i = 0; i < size && held < num_top; i += 32) {
          const int at = i + static_cast<int>(threadIdx.x);
          const bool tied = at < size && order_key(row[at]) == key;
          const uint32_t mask = __ballot_sync(~0u, tied);
          const int place = held + __popc(mask & ((1u << threadIdx.x) - 1));
          if (tied && place < num_top) {
            s.top_keys[place] = static_cast<Sum>(key) << 32 | (0xFFFFFFFFu - static_cast<uint32_t>(at));
          }
          held += __popc(mask);
        }
        __syncwarp();
        if (static_cast<int>(threadIdx.x) < num_top) {
          const Sum mine = s.top_keys[threadIdx.x];
          int rank = 0;
          for (int i = 0; i < num_top; ++i) rank += s.top_keys[i] > mine;
          const int token = static_cast<int>(0xFFFFFFFFu - static_cast<uint32_t>(mine));
          p.out_top_ids[r * kMaxTop + rank] = token;
          p.out_top_logprobs[r * kMaxTop + rank] =
              static_cast<float>(static_cast<double>(row[token]) - best - log_total);
        }
      }
    }
  }
  if (counts != nullptr && threadIdx.x == 0) ++counts[id];
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) sample_kernel(const __grid_constant__ SampleParams p) {
  __shared__ Scratch s;
  pdl_launch();
  pdl_wait();
  const int r = blockIdx.x, slot = __ldcg(p.slots + r), size = p.vocab_size;
  if (slot < 0 || slot >= p.num_slots) return;
  const int64_t offset = static_cast<int64_t>(r) * p.width;
  const T* logits = static_cast<const T*>(p.logits) + offset;
  const float frequency = p.frequency[slot], presence = p.presence[slot];
  const bool penalised = p.counts != nullptr && (frequency != 0.0f || presence != 0.0f);
  const int num_bias = min(p.bias_count[slot], p.max_bias);
  int32_t* counts = penalised ? p.counts + static_cast<int64_t>(slot) * size : nullptr;
  const int mask_row = __ldcg(p.mask_rows + slot);  // written while the forward pass ran: never from a stale cache
  const bool masked = mask_row >= 0 && mask_row < p.num_masks;
  if (masked || penalised || num_bias > 0) {
    float* adjusted = p.adjusted + offset;
    if (masked) {
      const int32_t* mask = p.masks + static_cast<int64_t>(mask_row) * ((size + 31) / 32);
      for_each(RowView<T>{logits}, 0, size, [&](int i, float logit) {
        adjusted[i] = __ldcg(mask + i / 32) >> (i % 32) & 1 ? logit : -INFINITY;
      });
    } else {
      for_each(RowView<T>{logits}, 0, size, [&](int i, float logit) { adjusted[i] = logit; });
    }
    __syncthreads();
    if (threadIdx.x == 0) {  // in the order given: an id may come twice
      for (int i = 0; i < num_bias; ++i) {
        const int id = p.bias_ids[slot * p.max_bias + i];
        if (id >= 0 && id < size) adjusted[id] += p.bias_values[slot * p.max_bias + i];
      }
    }
    __syncthreads();
    if (penalised) {
      for (int i = threadIdx.x; i < size; i += kThreads) {
        const int count = counts[i];
        // Rounded as the CPU's sampler and the reference do.
        adjusted[i] -= __fadd_rn(__fmul_rn(frequency, static_cast<float>(count)), count > 0 ? presence : 0.0f);
      }
    }
    __syncthreads();
    sample_row(p, RowView<float>{adjusted}, r, slot, counts, s);
  } else {
    sample_row(p, RowView<T>{logits}, r, slot, counts, s);
  }
}

/// As the CPU's `sample`, all on the device. logits (R, width) float32 or bfloat16 stay as they are; `workspace` is (R,
/// width) float32 and needed only by rows with a mask, bias or penalties. A slot has at most one row. Parameters are not checked.
void sample(TensorView logits, int64_t vocab_size, TensorView slots, TensorView positions, TensorView temperature,
            TensorView top_p, TensorView top_k, TensorView min_p, TensorView frequency_penalty,
            TensorView presence_penalty, TensorView seed, TensorView bias_ids, TensorView bias_values,
            TensorView bias_count, TensorView output_counts, TensorView num_logprobs, TensorView masks,
            TensorView mask_rows, TensorView workspace, TensorView out_ids, TensorView out_logprob, TensorView out_top_ids, TensorView out_top_logprobs) {
  check_rank("logits", logits, 2);
  check_rank("temperature", temperature, 1);
  check_rank("bias_ids", bias_ids, 2);
  check_rank("output_counts", output_counts, 2);
  check_rank("masks", masks, 2);
  const int64_t num_rows = logits.size(0), width = logits.size(1), num_slots = temperature.size(0);
  const int64_t max_bias = bias_ids.size(1);
  if (vocab_size < 1 || vocab_size > width || vocab_size > 1 << 18) {
    TVM_FFI_THROW(ValueError) << "vocab_size is " << vocab_size << ", expected 1 to " << width << " and at most 2^18";
  }
  SampleParams p{};
  const bool is_bf16 = has_dtype<bf16>(logits);
  p.logits = is_bf16 ? static_cast<const void*>(checked<bf16>("logits", logits, {num_rows, width}))
                       : checked<float>("logits", logits, {num_rows, width});
  p.adjusted = checked<float>("workspace", workspace, {num_rows, width});
  p.slots = checked<int32_t>("slots", slots, {num_rows});
  p.positions = checked<int32_t>("positions", positions, {num_rows});
  p.temperature = checked<float>("temperature", temperature, {num_slots});
  p.top_p = checked<float>("top_p", top_p, {num_slots});
  p.top_k = checked<int32_t>("top_k", top_k, {num_slots});
  p.min_p = checked<float>("min_p", min_p, {num_slots});
  p.frequency = checked<float>("frequency_penalty", frequency_penalty, {num_slots});
  p.presence = checked<float>("presence_penalty", presence_penalty, {num_slots});
  p.seed = checked<int64_t>("seed", seed, {num_slots});
  p.bias_ids = checked<int32_t>("bias_ids", bias_ids, {num_slots, max_bias});
  p.bias_values = checked<float>("bias_values", bias_values, {num_slots, max_bias});
  p.bias_count = checked<int32_t>("bias_count", bias_count, {num_slots});
  const bool has_counts = output_counts.size(0) != 0;
  if (has_counts) p.counts = checked<int32_t>("output_counts", output_counts, {num_slots, vocab_size});
  p.num_logprobs = checked<int32_t>("num_logprobs", num_logprobs, {num_slots});
  p.masks = checked<int32_t>("masks", masks, {masks.size(0), (vocab_size + 31) / 32});
  p.mask_rows = checked<int32_t>("mask_rows", mask_rows, {num_slots});
  p.num_masks = static_cast<int>(masks.size(0));
  p.out_ids = checked<int32_t>("out_ids", out_ids, {num_rows});
  p.out_logprob = checked<float>("out_logprob", out_logprob, {num_rows});
  p.out_top_ids = checked<int32_t>("out_top_ids", out_top_ids, {num_rows, kMaxTop});
  p.out_top_logprobs = checked<float>("out_top_logprobs", out_top_logprobs, {num_rows, kMaxTop});
  p.width = static_cast<int>(width), p.vocab_size = static_cast<int>(vocab_size);
  p.max_bias = static_cast<int>(max_bias), p.num_slots = static_cast<int>(num_slots);
  launch(is_bf16 ? sample_kernel<bf16> : sample_kernel<float>, static_cast<unsigned>(num_rows), kThreads, 0,
         stream_of(out_ids), p);
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(sample, sample);

}  // namespace
}  // namespace tpserve::cuda
