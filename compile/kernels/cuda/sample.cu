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
// One block per row, or several where its best token is all that is wanted (sample_best.cuh): it adjusts the logits, finds the best, cuts the ranking (sample_cut.cuh), draws from what is left
// (sample_race.cuh), and writes log-probabilities (sample_logprobs.cuh has those of the best tokens). Weights are float32
// exponentials in units of 2^-44, so their sums are integers: the same whatever the order of adding, on every rank. Rows
// with slot -1 are padding and skipped. A row without a finite maximum, or with a NaN, gets id -1.
#include <cfloat>

#include "sample_best.cuh"
#include "sample_cut.cuh"
#include "sample_logprobs.cuh"
#include "sample_race.cuh"

namespace tpserve::cuda {
namespace {

/// Rules 4 and 5, for a temperature above 0.
template <typename T>
__device__ __forceinline__ int draw(const SampleParams& p, const RowView<T>& row, int r, int slot, float best,
                                    float temperature, int size, SampleScratch& s) {
  const int top_k = p.top_k[slot];
  const float min_p = p.min_p[slot];
  const Rule rule{best, 1.0f / temperature, p.top_p[slot], top_k > 0 && top_k < size ? top_k : 0};
  Cut cut{0, 0};
  if ((rule.top_k > 0 || rule.top_p < 1.0f) && !cut_by_sorting(row, size, rule, s, &cut)) {
    cut = cut_by_selection(row, size, rule, s);
  }
  int last_tie = size;  // tokens with the cut's key are kept up to this id
  if (cut.ties > 0) {
    const auto tied = [&](int, float logit) { return order_key(logit) == cut.key ? Sum{1} : Sum{0}; };
    last_tie = find_running(row, size, tied, cut.ties, s);
  }
  const Sum min_weight = min_p > 0.0f ? __float2ull_ru(min_p * kWeightUnit) : 0;
  const auto kept_weight = [&](int i, float logit) {
    const uint32_t key = order_key(logit);
    if (key < cut.key || (key == cut.key && i > last_tie)) return Sum{0};
    const Sum weight = rule.weight(logit);
    return weight >= min_weight ? weight : Sum{0};
  };
  const auto position = static_cast<uint64_t>(p.positions[r]);
  return race(row, size, static_cast<uint64_t>(p.seed[slot]), position, kept_weight, s);  // the best has a weight
}

/// Writes a row's token, or -1 if its logits do not tell one, and that no log-probability is known yet; returns whether one is
/// told.
__device__ __forceinline__ bool put_best(const SampleParams& p, int r, RankedToken top) {
  const bool told = fabsf(logit_of_key(key_of(top))) <= FLT_MAX;  // not of a NaN's key
  if (threadIdx.x == 0) p.out_ids[r] = told ? id_of(top) : -1;
  if (told && threadIdx.x < kMaxTop) {
    p.out_top_ids[r * kMaxTop + threadIdx.x] = -1;
    p.out_top_logprobs[r * kMaxTop + threadIdx.x] = -INFINITY;
  }
  if (told && threadIdx.x == 0) p.out_logprob[r] = NAN;
  return told;
}

/// Samples row r from its adjusted logits; `counts` is null without penalties.
template <typename T>
__device__ void sample_row(const SampleParams& p, const RowView<T>& row, int r, int slot, int32_t* counts,
                           SampleScratch& s) {
  const int size = p.vocab_size;
  const RankedToken top = best_of(row, 0, size, s);
  if (!put_best(p, r, top)) return;
  const float best = logit_of_key(key_of(top));
  int id = id_of(top);

  const float temperature = p.temperature[slot];
  if (temperature > 0.0f) {
    id = draw(p, row, r, slot, best, temperature, size, s);
    if (threadIdx.x == 0) p.out_ids[r] = id;
  }

  const int num_top = min(p.num_logprobs[slot], min(size, kMaxTop));
  if (num_top >= 0) {
    double total = 0.0;
    for_each(row, size, [&](int, float logit) { total += static_cast<double>(expf(logit - best)); });
    const double log_total = log(block_reduce(total, 0.0, s.reduce_double, Add{}));
    if (threadIdx.x == 0) p.out_logprob[r] = static_cast<float>(static_cast<double>(row[id]) - best - log_total);
    if (num_top > 0) write_top_logprobs(p, row, size, r, num_top, best, log_total, s);
  }
  if (counts != nullptr && threadIdx.x == 0) ++counts[id];
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 1) sample_kernel(const __grid_constant__ SampleParams p) {
  __shared__ SampleScratch s;
  pdl_launch();
  // No kernel behind a step's plan writes slots, and none at all their parameters.
  const int r = blockIdx.x / p.num_slices, slot = __ldcg(p.slots + r), size = p.vocab_size;
  const bool is_padding = slot < 0 || slot >= p.num_slots;
  const bool is_split = p.num_slices > 1 && !is_padding && needs_only_best(p, r);
  pdl_wait();
  if (is_padding) return;
  if (p.is_best_told) {
    if (const RankedToken top = best_of_slices(p, r, kBestSlices); top != 0) {
      put_best(p, r, top);
      return;
    }
  }
  const int64_t offset = static_cast<int64_t>(r) * p.width;
  const T* logits = static_cast<const T*>(p.logits) + offset;
  const int slice = blockIdx.x % p.num_slices;
  if (is_split) {
    if (const RankedToken top = join_slices(p, RowView<T>{logits}, r, slice, s); top != 0) put_best(p, r, top);
    return;
  }
  if (slice > 0) return;
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
      for_each(RowView<T>{logits}, size, [&](int i, float logit) {
        adjusted[i] = __ldcg(mask + i / 32) >> (i % 32) & 1 ? logit : -INFINITY;
      });
    } else {
      for_each(RowView<T>{logits}, size, [&](int i, float logit) { adjusted[i] = logit; });
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

/// As the CPU's `sample`, all on the device. logits (R, width) float32 or bfloat16 stay as they are, unless they are the
/// `workspace`, which is (R, width) float32 and needed only by rows with a mask, bias or penalties. `best` is (R, kBestSlices):
/// if it `is_best_told`, rows that have a token there are done, and their logits are not read. `arrived` is (R,), zero before
/// and after. A slot has at most one row. Parameters are not checked.
void sample(TensorView logits, TensorView best, bool is_best_told, TensorView arrived, int64_t vocab_size,
            TensorView slots, TensorView positions,
            TensorView temperature, TensorView top_p, TensorView top_k, TensorView min_p, TensorView frequency_penalty,
            TensorView presence_penalty, TensorView seed, TensorView bias_ids, TensorView bias_values,
            TensorView bias_count, TensorView output_counts, TensorView num_logprobs, TensorView masks,
            TensorView mask_rows, TensorView workspace, TensorView out_ids, TensorView out_logprob,
            TensorView out_top_ids, TensorView out_top_logprobs) {
  check_rank("logits", logits, 2);
  check_rank("temperature", temperature, 1);
  check_rank("bias_ids", bias_ids, 2);
  check_rank("output_counts", output_counts, 2);
  check_rank("masks", masks, 2);
  const int64_t num_rows = logits.size(0), width = logits.size(1), num_slots = temperature.size(0);
  const int64_t max_bias = bias_ids.size(1);
  if (vocab_size < 1 || vocab_size > width || vocab_size > kMaxVocabSize) {
    TVM_FFI_THROW(ValueError) << "vocab_size is " << vocab_size << ", expected 1 to " << width << " and at most 2^18";
  }
  SampleParams p{};
  const bool is_bf16 = has_dtype<bf16>(logits);
  p.logits = is_bf16 ? static_cast<const void*>(checked<bf16>("logits", logits, {num_rows, width}))
                     : checked<float>("logits", logits, {num_rows, width});
  p.best = reinterpret_cast<RankedToken*>(checked<int64_t>("best", best, {num_rows, kBestSlices}));
  p.is_best_told = is_best_told;
  p.arrived = checked<int32_t>("arrived", arrived, {num_rows});
  p.num_slices = is_best_told ? 1 : num_slices_of(num_rows);
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
  launch(is_bf16 ? sample_kernel<bf16> : sample_kernel<float>, static_cast<unsigned>(num_rows * p.num_slices), kThreads,
         0, stream_of(out_ids), p);
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(sample, sample);

}  // namespace
}  // namespace tpserve::cuda
