// The next token of each row of logits, by the rules of the CPU's `sample` (worker/reference_sampler.py is the plain twin):
//   1. logits += bias; logits -= frequency_penalty * count + presence_penalty * (count > 0).
//   2. Log-probabilities are the log-softmax of that.
//   3. temperature 0: the highest logit, the lowest id among equals.
//   4. Otherwise weight(i) = exp((logit(i) - max) / temperature). Tokens are ranked by logit, then by lower id. top_k keeps
//      the k best; top_p then the shortest prefix of the ranking whose weight reaches top_p of what top_k left; min_p then
//      drops weights below min_p.
//   5. With one uniform u of Philox4x32-10 (key: seed, counter: position): the lowest kept id at which the running sum of
//      kept weights, in ascending id, exceeds u times their total.
//
// One block per row. Weights are float32 exponentials in units of 2^-44, so their sums are integers: the same whatever the
// order of adding, on every rank. Cuts are found by radix selection on the bits of the logits, three passes of 2048 bins;
// nothing is sorted. Rows with slot -1 are padding and skipped. A row without a finite maximum, or with a NaN, gets id -1.
#include <cfloat>

#include "common.cuh"

namespace tpserve::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kWarps = kThreads / 32;
constexpr int kBins = 2048;
constexpr int kMaxTop = 20;
constexpr float kUnit = 17592186044416.0f;  // 2^44: weights of 2^18 tokens fit in 64 bits

using Sum = unsigned long long;

struct SampleParams {
  const void* logits;  // (R, width) float32 or bfloat16
  float* adjusted;     // (R, width); rows with bias or penalties are worked on here
  const int32_t *slots, *positions;
  const float *temperature, *top_p, *min_p, *frequency, *presence, *bias_values;
  const int32_t *top_k, *bias_ids, *bias_count, *num_logprobs;
  const int64_t* seed;
  int32_t* counts;  // null: no slot has penalties
  int32_t *out_ids, *out_top_ids;
  float *out_logprob, *out_top_logprobs;
  int width, vocab_size, max_bias, num_slots;
  bool is_bf16;
};

/// Orders as the logit does.
__device__ __forceinline__ uint32_t order_key(float logit) {
  const uint32_t bits = __float_as_uint(logit + 0.0f);  // -0 and 0 are equal
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ float logit_of_key(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7FFFFFFFu : ~key);
}

struct RowView {
  const float* f32;
  const bf16* b16;  // if f32 is null
  __device__ __forceinline__ float operator[](int i) const {
    return f32 != nullptr ? f32[i] : __bfloat162float(b16[i]);
  }
};

struct Scratch {
  Sum bins[kBins];
  Sum warp_sums[kWarps];
  Sum selected_sum, selected_bin_sum;
  int selected_bin;
  Sum reduce64[32];
  double reduce_double[32];
  int ties[kWarps];
  int found, last;
  int top_count;
  Sum top_keys[kMaxTop];
};

/// Philox4x32-10: 53 bits as a number in [0, 1).
__device__ double uniform(uint64_t seed, uint64_t counter) {
  uint32_t x[4] = {static_cast<uint32_t>(counter), static_cast<uint32_t>(counter >> 32), 0, 0};
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
  return static_cast<double>(static_cast<uint64_t>(x[0]) << 21 | x[1] >> 11) * 0x1p-53;
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

/// Finds the key at which the measure of the keys above stays below `target` and with it reaches it. `measure(i, key)` is
/// zero for tokens that do not count; `extra` is added at `extra_key`. `above` receives the measure of all keys above.
template <typename Measure>
__device__ uint32_t select_key(const RowView& row, int size, Sum target, Measure measure, uint32_t extra_key, Sum extra,
                               Scratch& s, Sum* above) {
  uint32_t prefix = 0, mask = 0;
  Sum passed = 0;
#pragma unroll 1
  for (int shift = 21; shift >= 0; shift = shift == 21 ? 10 : shift == 10 ? 0 : -1) {
    const int bits = shift == 0 ? 10 : 11, bins = 1 << bits;
    for (int i = threadIdx.x; i < kBins; i += kThreads) s.bins[i] = 0;
    __syncthreads();
    for (int i = threadIdx.x; i < size; i += kThreads) {
      const uint32_t key = order_key(row[i]);
      if ((key & mask) != prefix) continue;
      const Sum value = measure(i, key);
      if (value != 0) atomicAdd(&s.bins[key >> shift & (bins - 1)], value);
    }
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

/// Each warp has a contiguous part of the ids; what a warp sees is ascending.
struct WarpPart {
  int begin, end;
  __device__ explicit WarpPart(int size) {
    const int chunk = (size + kWarps * 32 - 1) / (kWarps * 32) * 32;
    begin = min(size, static_cast<int>(threadIdx.x / 32) * chunk), end = min(size, begin + chunk);
  }
};

struct Draw {
  const RowView& row;
  int size;
  float best, inverse_temperature;
  Cut cut;
  Sum min_weight;

  /// Weight of token i if it is kept; `ties` counts the tokens with the cut's key before this warp's position.
  __device__ __forceinline__ Sum kept_weight(int i, int end, Sum& ties) const {
    const int lane = threadIdx.x % 32;
    const bool present = i < end;
    const float logit = present ? row[i] : -INFINITY;
    const uint32_t key = order_key(logit);
    const bool tied = present && key == cut.key;
    const uint32_t mask = __ballot_sync(~0u, tied);
    const bool kept = present && (key > cut.key || (tied && ties + __popc(mask & ((1u << lane) - 1)) < cut.ties));
    ties += __popc(mask);
    if (!kept) return 0;
    const Sum weight = weight_of(logit, best, inverse_temperature);
    return weight >= min_weight ? weight : 0;
  }
};

__device__ int draw(const Draw& d, double u, Scratch& s) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const WarpPart part(d.size);
  int tied = 0;
  for (int i = part.begin + lane; i < part.end; i += 32) tied += order_key(d.row[i]) == d.cut.key;
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) tied += __shfl_xor_sync(~0u, tied, offset);
  __syncthreads();
  if (lane == 0) s.ties[warp] = tied;
  if (threadIdx.x == 0) s.found = s.last = -1;
  __syncthreads();
  Sum ties_before = 0;
  for (int w = 0; w < warp; ++w) ties_before += s.ties[w];
  Sum ties = ties_before, mine = 0;
  for (int i = part.begin; i < part.end; i += 32) mine += d.kept_weight(i + lane, part.end, ties);
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) mine += __shfl_xor_sync(~0u, mine, offset);
  if (lane == 0) s.warp_sums[warp] = mine;
  __syncthreads();
  Sum total = 0, running = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) running += s.warp_sums[w];
    total += s.warp_sums[w];
  }
  const double target = u * static_cast<double>(total);
  const bool has_it = static_cast<double>(running) <= target && static_cast<double>(running + mine) > target;
  if (has_it || mine > 0) {  // the same for the whole warp
    ties = ties_before;
    int last = -1;
    for (int i = part.begin; i < part.end && has_it; i += 32) {
      const Sum weight = d.kept_weight(i + lane, part.end, ties);
      Sum scan = weight;
#pragma unroll
      for (int offset = 1; offset < 32; offset *= 2) {
        const Sum other = __shfl_up_sync(~0u, scan, offset);
        if (lane >= offset) scan += other;
      }
      const uint32_t above = __ballot_sync(~0u, static_cast<double>(running + scan) > target && weight > 0);
      if (above != 0) {
        if (lane == 0) s.found = i + __ffs(above) - 1;
        break;
      }
      running += __shfl_sync(~0u, scan, 31);
      const uint32_t some = __ballot_sync(~0u, weight > 0);
      if (some != 0) last = i + 31 - __clz(some);
    }
    if (lane == 0 && last >= 0) atomicMax(&s.last, last);
  }
  __syncthreads();
  return s.found >= 0 ? s.found : s.last;
}

__global__ void __launch_bounds__(kThreads, 1) sample_kernel(const __grid_constant__ SampleParams p) {
  __shared__ Scratch s;
  pdl_launch();
  pdl_wait();
  const int r = blockIdx.x, slot = __ldcg(p.slots + r), size = p.vocab_size;
  if (slot < 0 || slot >= p.num_slots) return;
  const int64_t offset = static_cast<int64_t>(r) * p.width;
  RowView row{p.is_bf16 ? nullptr : static_cast<const float*>(p.logits) + offset,
              p.is_bf16 ? static_cast<const bf16*>(p.logits) + offset : nullptr};
  const float frequency = p.frequency[slot], presence = p.presence[slot];
  const bool penalised = p.counts != nullptr && (frequency != 0.0f || presence != 0.0f);
  const int num_bias = min(p.bias_count[slot], p.max_bias);
  int32_t* counts = penalised ? p.counts + static_cast<int64_t>(slot) * size : nullptr;
  if (penalised || num_bias > 0) {
    float* adjusted = p.adjusted + offset;
    for (int i = threadIdx.x; i < size; i += kThreads) adjusted[i] = row[i];
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
    row = {adjusted, nullptr};
  }

  // The best token, the lowest id among equals.
  Sum top = 0;
  bool bad = false;
  for (int i = threadIdx.x; i < size; i += kThreads) {
    const float x = row[i];
    bad |= x != x;
    const Sum key = static_cast<Sum>(order_key(x)) << 32 | (0xFFFFFFFFu - static_cast<uint32_t>(i));
    top = key > top ? key : top;
  }
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
    const float inverse = 1.0f / temperature;
    const int top_k = p.top_k[slot];
    const float top_p = p.top_p[slot], min_p = p.min_p[slot];
    Cut cut{0, 0};  // keeps all: no key is below that of -infinity
    if (top_k > 0 && top_k < size) {
      Sum above;
      cut.key = select_key(row, size, static_cast<Sum>(top_k), [](int, uint32_t) { return Sum{1}; }, 0, 0, s, &above);
      cut.ties = static_cast<Sum>(top_k) - above;
    }
    if (top_p < 1.0f) {
      const Sum tied_weight = cut.ties == 0 ? 0 : weight_of(logit_of_key(cut.key), best, inverse);
      const uint32_t lowest = cut.key;
      const auto measure = [&](int i, uint32_t key) {
        return key > lowest ? weight_of(row[i], best, inverse) : Sum{0};
      };
      Sum total = 0;
      for (int i = threadIdx.x; i < size; i += kThreads) total += measure(i, order_key(row[i]));
      total = block_reduce(total, Sum{0}, s.reduce64, Add{}) + cut.ties * tied_weight;
      const double exact = static_cast<double>(top_p) * static_cast<double>(total);
      Sum target = static_cast<Sum>(ceil(exact));
      target = target < 1 ? 1 : target > total ? total : target;
      Sum above;
      const uint32_t key = select_key(row, size, target, measure, cut.key, cut.ties * tied_weight, s, &above);
      const Sum weight = weight_of(logit_of_key(key), best, inverse);
      const Sum ties = weight == 0 ? 1 : (target - above + weight - 1) / weight;
      cut.ties = key == cut.key && cut.ties < ties ? cut.ties : ties;
      cut.key = key;
    }
    const Draw d{row, size, best, inverse, cut, min_p > 0.0f ? __float2ull_ru(min_p * kUnit) : 0};
    id = draw(d, uniform(static_cast<uint64_t>(p.seed[slot]), static_cast<uint64_t>(p.positions[r])), s);
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
    for (int i = threadIdx.x; i < size; i += kThreads) total += static_cast<double>(expf(row[i] - best));
    const double log_total = log(block_reduce(total, 0.0, s.reduce_double, Add{}));
    if (threadIdx.x == 0) p.out_logprob[r] = static_cast<float>(static_cast<double>(row[id]) - best - log_total);
    if (num_top > 0) {
      Sum above;
      const uint32_t key = select_key(row, size, static_cast<Sum>(num_top), [](int, uint32_t) { return Sum{1}; }, 0, 0, s,
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
  if (penalised && threadIdx.x == 0) ++counts[id];
}

/// As the CPU's `sample`, all on the device. logits (R, width) float32 or bfloat16 stay as they are; `workspace` is (R,
/// width) float32 and needed only by rows with bias or penalties. A slot has at most one row. Parameters are not checked.
void sample(TensorView logits, int64_t vocab_size, TensorView slots, TensorView positions, TensorView temperature,
            TensorView top_p, TensorView top_k, TensorView min_p, TensorView frequency_penalty,
            TensorView presence_penalty, TensorView seed, TensorView bias_ids, TensorView bias_values,
            TensorView bias_count, TensorView output_counts, TensorView num_logprobs, TensorView workspace,
            TensorView out_ids, TensorView out_logprob, TensorView out_top_ids, TensorView out_top_logprobs) {
  check_rank("logits", logits, 2);
  check_rank("temperature", temperature, 1);
  check_rank("bias_ids", bias_ids, 2);
  check_rank("output_counts", output_counts, 2);
  const int64_t num_rows = logits.size(0), width = logits.size(1), num_slots = temperature.size(0);
  const int64_t max_bias = bias_ids.size(1);
  if (vocab_size < 1 || vocab_size > width || vocab_size > 1 << 18) {
    TVM_FFI_THROW(ValueError) << "vocab_size is " << vocab_size << ", expected 1 to " << width << " and at most 2^18";
  }
  SampleParams p{};
  p.is_bf16 = has_dtype<bf16>(logits);
  p.logits = p.is_bf16 ? static_cast<const void*>(checked<bf16>("logits", logits, {num_rows, width}))
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
  p.out_ids = checked<int32_t>("out_ids", out_ids, {num_rows});
  p.out_logprob = checked<float>("out_logprob", out_logprob, {num_rows});
  p.out_top_ids = checked<int32_t>("out_top_ids", out_top_ids, {num_rows, kMaxTop});
  p.out_top_logprobs = checked<float>("out_top_logprobs", out_top_logprobs, {num_rows, kMaxTop});
  p.width = static_cast<int>(width), p.vocab_size = static_cast<int>(vocab_size);
  p.max_bias = static_cast<int>(max_bias), p.num_slots = static_cast<int>(num_slots);
  launch(sample_kernel, static_cast<unsigned>(num_rows), kThreads, 0, stream_of(out_ids), p);
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(sample, sample);

}  // namespace
}  // namespace tpserve::cuda
