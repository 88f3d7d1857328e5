// Decode items: up to sixteen rows, in one or two tiles of eight, over one chunk of positions. Rows are the second operand
// of products, so that a group of eight query heads wastes nothing; slices of keys and values, sixteen positions each, are
// the first. Eight warps in two teams: teams take turns with the stages, warps of a team have a slice of a stage each.
// What a decode costs is this chain, much more than its bytes: hence short ones, and sums that all warps add and write.
//
// Where items are many, a block has one team, which keeps both teams' sums, and two blocks share a multiprocessor: one
// fetches while the other begins or ends an item. All sums have the same order, so the bits are the same.
//
// A run, or a piece of one, whose positions are cut into chunks: its items leave sums in places of their own (slots.cuh), and
// that of the last chunk adds them, in the order of positions. Why the last may wait for the others: it comes after them in
// the plan, blocks take items in the plan's order, and all of a kernel's blocks run before one of the next kernel does. So of
// all items that are not done, the first waits for none.
#pragma once

#include "attention_fetch.cuh"
#include "attention_queries.cuh"
#include "slots.cuh"

namespace tpserve::cuda {

/// What is taken from scaled scores, of which `top` is the largest, and the weight of a score. Products and sums are spelt out,
/// for the compiler fuses others as it likes: items have the same bits in every kernel.
__device__ __forceinline__ float shift_of(float top, float scale) { return top == -INFINITY ? 0.0f : __fmul_rn(top, scale); }
__device__ __forceinline__ float weight_of(float score, float shift, float scale) {
  return fast_exp2(__fmaf_rn(score, scale, -shift));
}

/// Online softmax of a warp over its slices; a thread has rows 8 t + 2 (lane % 4) and the next of each tile t.
template <typename KV, int kHeadDim, int kTiles>
struct DecodeSums {
  using F = Fragments<KV, kHeadDim>;
  static constexpr int kColumns = kHeadDim / 16;
  float out[kTiles][kColumns][4];  // dimensions 16 n + lane / 4 of both rows, then the eighth after each
  float top[kTiles][2], sum[kTiles][2];

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      top[t][0] = top[t][1] = -INFINITY, sum[t][0] = sum[t][1] = 0.0f;
#pragma unroll
      for (int n = 0; n < kColumns; ++n) out[t][n][0] = out[t][n][1] = out[t][n][2] = out[t][n][3] = 0.0f;
    }
  }

  /// Takes the slice at `slice` in shared memory, the first of its positions being `position`.
  __device__ __forceinline__ void attend(const Queries<KV, kHeadDim, kTiles>& queries, uint32_t slice, int position,
                                         const Item& item, const Range& range, int group, int window, float scale) {
    const int lane = threadIdx.x % 32;
    float score[kTiles][2][4] = {};  // two chains, for a product waits for the one before it
#pragma unroll
    for (int k = 0; k < kColumns; k += F::kColumns) {
      uint32_t b[F::kColumns][4];
      F::keys(slice, 0, lane, k, b);
#pragma unroll
      for (int c = 0; c < F::kColumns; ++c) {
        const uint32_t a[4] = {b[c][0], b[c][2], b[c][1], b[c][3]};
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          F::multiply_add(score[t][(k + c) % 2], a, queries.pair[t][k + c][0], queries.pair[t][k + c][1]);
        }
      }
    }
    // Where a row sees less than all of these positions: rows see up to `item.position` at least, the last up to the newest.
    const int newest = item.position + item.count - 1;
    const bool inside = position + kSliceRows - 1 <= item.position && (window == 0 || position > newest - window);
    uint32_t weights[kTiles][2];
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      float s[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) s[i] = score[t][0][i] + score[t][1][i];
      if (!inside) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int row = t * 8 + lane % 4 * 2 + i % 2, at = position + lane / 4 + i / 2 * 8;
          // Rows that are not there repeat the last token; whatever they hold is never written.
          const int last = min(item.position + row / group, newest);
          if (at > last || (window > 0 && at <= last - window)) s[i] = -INFINITY;
        }
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float best = fmaxf(top[t][e], fmaxf(s[e], s[e + 2]));
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) best = fmaxf(best, __shfl_xor_sync(~0u, best, lanes));
        const float shift = shift_of(best, scale), factor = weight_of(top[t][e], shift, scale);
        top[t][e] = best;
        s[e] = weight_of(s[e], shift, scale), s[e + 2] = weight_of(s[e + 2], shift, scale);
        sum[t][e] = __fmaf_rn(sum[t][e], factor, s[e] + s[e + 2]);
#pragma unroll
        for (int n = 0; n < kColumns; ++n) out[t][n][e] *= factor, out[t][n][e + 2] *= factor;
      }
      weights[t][0] = transpose_8x8(F::weight2(s[0], s[1])), weights[t][1] = transpose_8x8(F::weight2(s[2], s[3]));
    }
    // Positions that nobody wrote may hold NaN, which a weight of zero would not remove.
    uint32_t keep[2] = {~0u, ~0u};
    const int low = range.begin & ~(kSliceRows - 1);
    if (position < low || position + kSliceRows > range.end) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int at = position + h * 8 + lane % 4 * 2;
        keep[h] = (at >= low && at < range.end ? 0xFFFFu : 0u) | (at + 1 >= low && at + 1 < range.end ? 0xFFFF0000u : 0u);
      }
    }
#pragma unroll
    for (int n = 0; n < kColumns; n += F::kColumns) {
      uint32_t b[F::kColumns][4];
      F::values(slice, 0, lane, n, b);
#pragma unroll
      for (int c = 0; c < F::kColumns; ++c) {
        const uint32_t a[4] = {b[c][0] & keep[0], b[c][2] & keep[0], b[c][1] & keep[1], b[c][3] & keep[1]};
#pragma unroll
        for (int t = 0; t < kTiles; ++t) F::multiply_add(out[t][n + c], a, weights[t][0], weights[t][1]);
      }
    }
  }
};

/// A row's sums over some positions: four dimensions a lane, from 4 lane on, of the lanes that there are dimensions for.
struct RowSums {
  float values[4];
  float top, sum;

  /// Adds those over other positions.
  __device__ __forceinline__ void add(const RowSums& more, float scale) {
    const float best = fmaxf(top, more.top), shift = shift_of(best, scale);
    const float own = weight_of(top, shift, scale), other = weight_of(more.top, shift, scale);
    top = best, sum = __fmaf_rn(sum, own, __fmul_rn(more.sum, other));
#pragma unroll
    for (int i = 0; i < 4; ++i) values[i] = __fmaf_rn(values[i], own, __fmul_rn(more.values[i], other));
  }
};

/// Where the chunks of one (row, KV head) leave sums: head_dim of them, then the top score and the sum of weights.
struct ChunkPlaces {
  float4* first;
  int step;  // to the next chunk's

  template <int kHeadDim, typename KV>
  static __device__ __forceinline__ ChunkPlaces of(const AttentionParams<KV>& p, const Item& item, int row, int head) {
    const int64_t place =
        (static_cast<int64_t>(item.first_row + row) * kMaxSplits + item.first_place) * p.kv.num_kv_heads + head;
    constexpr int kVectors = (kHeadDim + 4) / 4;
    return {reinterpret_cast<float4*>(p.partial) + place * kVectors, p.kv.num_kv_heads * kVectors};
  }
};

/// Adds the sums of the first chunks, `others` of them, which come from other blocks, and empties their places. By a warp,
/// whose lanes have a row in turn of kLanes. Not inlined: it is rare, and its registers would be missing in the products.
template <int kHeadDim, int kLanes>
__device__ __noinline__ RowSums add_chunks(ChunkPlaces places, int others, float scale) {
  constexpr int kBatch = 4;
  const int lane = threadIdx.x % 32;
  RowSums all{{}, -INFINITY, 0.0f};
  for (int first = 0; first < others; first += kBatch, places.first += kBatch * places.step) {
    uint4 values[kBatch], state[kBatch];
    const auto ask = [&](int i) {
      const float4* place = places.first + i * places.step;
      values[i] = load_slot(place + lane % (kHeadDim / 4)), state[i] = load_slot(place + kHeadDim / 4);
    };
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i < others) ask(i);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i >= others) break;
      while (is_empty(values[i]) || is_empty(state[i])) ask(i);
      __syncwarp();  // all lanes have what they want
      float4* place = places.first + i * places.step;
      if (lane % kLanes < kHeadDim / 4) empty_slot(place + lane % kLanes);
      if (lane % kLanes == 0) empty_slot(place + kHeadDim / 4);
      all.add({{__uint_as_float(values[i].x), __uint_as_float(values[i].y), __uint_as_float(values[i].z),
                __uint_as_float(values[i].w)},
               __uint_as_float(state[i].x),
               __uint_as_float(state[i].y)},
              scale);
    }
  }
  return all;
}

/// Writes a row, or two that share a scale, which its halves have. By a warp.
template <int kHeadDim, Out kOut, typename KV>
__device__ __forceinline__ void write_sums(const AttentionParams<KV>& p, const Item& item, int row, int head,
                                           const RowSums& sums) {
  const int lane = threadIdx.x % 32;
  const int token = item.token + row / p.group, query_head = head * p.group + row % p.group;
  constexpr int kRows = kRowsOfScale<kOut, kHeadDim>;
  const int64_t at = out_at<kHeadDim>(p, token, query_head) + lane % (32 / kRows) * 4;
  const float inverse = value_scale(p) / sums.sum;
  const float(&v)[4] = sums.values;
  if constexpr (kOut == Out::kBf16) {
    if (lane >= kHeadDim / 4) return;
    *reinterpret_cast<uint2*>(p.out + at) =
        make_uint2(pack2(v[0] * inverse, v[1] * inverse), pack2(v[2] * inverse, v[3] * inverse));
  } else {
    float largest = fmaxf(fmaxf(fabsf(v[0]), fabsf(v[1])), fmaxf(fabsf(v[2]), fabsf(v[3]))) * inverse;
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, lanes));
    const float factor = inverse * store_scale(p, token, query_head / kRows, largest, lane == 0);
    *reinterpret_cast<uint32_t*>(p.quantized + at) = pack4_fp8(v[0] * factor, v[1] * factor, v[2] * factor, v[3] * factor);
  }
}

/// Where dimension d of a row stands among a warp's sums. Rows that its lanes have at once lie in different banks.
template <int kHeadDim>
__device__ __forceinline__ int added_at(int row, int d) {
  return row * kHeadDim + (d ^ row / 2 % 4 * 8);
}

/// Leaves the sums of a warp of the eight, which this one is or stands for, for the others.
template <typename KV, int kHeadDim, int kTiles>
__device__ __forceinline__ void leave_sums(Shared<KV, kHeadDim>& shared, DecodeSums<KV, kHeadDim, kTiles>& sums,
                                           float* target, int warp) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) sums.sum[t][e] += __shfl_xor_sync(~0u, sums.sum[t][e], lanes);
      if (lane < 4) shared.state[warp][t * 8 + lane * 2 + e] = make_float2(sums.top[t][e], sums.sum[t][e]);
    }
  }
  float* places[4];  // of dimensions that are the same but for 8 and 16
#pragma unroll
  for (int i = 0; i < 4; ++i) places[i] = target + added_at<kHeadDim>(lane % 4 * 2, i * 8 + lane / 4);
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int n = 0; n < kHeadDim / 16; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        places[n % 2 * 2 + i / 2][(t * 8 + i % 2) * kHeadDim + n / 2 * 32] = sums.out[t][n][i];
      }
    }
  }
}

/// The sums of all warps for a row. By a warp, whose lanes have a row in turn of kLanes.
template <int kLanes, typename KV, int kHeadDim>
__device__ __forceinline__ RowSums add_warps(Shared<KV, kHeadDim>& shared, const Scratch<KV, kHeadDim>& scratch, int slot,
                                             int row, float scale) {
  const int lane = threadIdx.x % 32;
  const float2 of_lane = shared.state[lane % kConsumerWarps][row];  // eight lanes after each other have all warps'
  RowSums all{{}, of_lane.x, 0.0f};
#pragma unroll
  for (int lanes = 1; lanes < kConsumerWarps; lanes *= 2) all.top = fmaxf(all.top, __shfl_xor_sync(~0u, all.top, lanes));
  const float factor = weight_of(of_lane.x, shift_of(all.top, scale), scale);
  all.sum = __fmul_rn(of_lane.y, factor);
#pragma unroll
  for (int lanes = 1; lanes < kConsumerWarps; lanes *= 2) all.sum += __shfl_xor_sync(~0u, all.sum, lanes);
  const int at = added_at<kHeadDim>(row, lane * 4 % kHeadDim);
#pragma unroll
  for (int w = 0; w < kConsumerWarps; ++w) {
    const float4 part = *reinterpret_cast<const float4*>(scratch.of(shared, slot, w) + at);
    const float of_warp = __shfl_sync(~0u, factor, w, kLanes);
    all.values[0] = __fmaf_rn(part.x, of_warp, all.values[0]), all.values[1] = __fmaf_rn(part.y, of_warp, all.values[1]);
    all.values[2] = __fmaf_rn(part.z, of_warp, all.values[2]), all.values[3] = __fmaf_rn(part.w, of_warp, all.values[3]);
  }
  return all;
}

/// Adds the warps' sums and writes the item's rows, or leaves them for the item of the run's last chunk. By all consumers.
template <Out kOut, typename KV, int kHeadDim, int kTiles, int kTeams>
__device__ __forceinline__ void finish_decode(const AttentionParams<KV>& p, Shared<KV, kHeadDim>& shared, const Item& item,
                                              int head, float scale, DecodeSums<KV, kHeadDim, kTiles> (&sums)[kTeams],
                                              RingPlace& place) {
  using S = Shared<KV, kHeadDim>;
  constexpr int kWarps = kConsumerWarps / kTeams, kRows = kRowsOfScale<kOut, kHeadDim>, kLanes = 32 / kRows;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Scratch<KV, kHeadDim> scratch(kTiles);
  const int slot = place.slot;
  RingPlace last = place;
  for (int i = 0; i < scratch.stages; ++i) {
    barrier_wait(&shared.full[last.slot], last.parity);
    last.advance(S::kStages);
  }
#pragma unroll
  for (int i = 0; i < kTeams; ++i) {
    const int of = warp + i * kWarps;
    leave_sums(shared, sums[i], scratch.of(shared, slot, of), of);
  }
  meet<1, kWarps * 32>();
#pragma unroll 1
  for (int first = warp * kRows; first < item.count * p.group; first += kWarps * kRows) {
    const int row = first + lane / kLanes;
    RowSums all = add_warps<kLanes>(shared, scratch, slot, row, scale);
    if (item.num_splits > 1) {
      // Chunks of a window start above zero; sums are kept by their order.
      const int begin = p.window > 0 ? max(0, item.position - p.window + 1) : 0;
      const int split = item.split - begin / item.chunk;
      const ChunkPlaces places = ChunkPlaces::of<kHeadDim>(p, item, row, head);
      if (split + 1 < item.num_splits) {
        float4* target = places.first + split * places.step;
        const int of_row = lane % kLanes;
        if (of_row < kHeadDim / 4) store_slot(target + of_row, all.values[0], all.values[1], all.values[2], all.values[3]);
        if (of_row == 0) store_slot(target + kHeadDim / 4, all.top, all.sum, 0.0f, 0.0f);
        continue;
      }
      RowSums chunks = add_chunks<kHeadDim, kLanes>(places, split, scale);
      chunks.add(all, scale);
      all = chunks;
    }
    write_sums<kHeadDim, kOut>(p, item, row, head, all);
  }
  async_proxy_fence();  // copies into the ring come after these sums
  meet<1, kWarps * 32>();  // and states are read
  for (int i = 0; i < scratch.stages; ++i) {
    if (lane == 0) barrier_arrive(&shared.empty[place.slot]);
    place.advance(S::kStages);
  }
}

/// `waited`: whether this thread has been at `pdl_wait`, before which a step that only decodes has more to do.
__device__ __forceinline__ void wait_once(bool& waited) {
  if (!waited) pdl_wait();
  waited = true;
}

/// A decode item of at most 8 kTiles rows. `kTeams`: whose sums each warp keeps.
template <int kTiles, Out kOut, bool kProjected, int kTeams, typename KV, int kHeadDim>
__device__ __forceinline__ void consume_decode(const AttentionParams<KV>& p, Shared<KV, kHeadDim>& shared, const Item& item,
                                               int head, bool& waited, RingPlace& place) {
  using S = Shared<KV, kHeadDim>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Range range(item, p.window);
  const float scale = ScoreScale<KV>(p).of(p);
  Queries<KV, kHeadDim, kTiles> queries;
  if constexpr (kProjected) {
    const QueryAngles<kHeadDim> angles(p.added.rope, item.position);
    wait_once(waited);
    queries.load_projected(p, item, head);
    queries.turn_projected(p.added, angles);
  } else {
    queries.load(p, item, head);
  }
  DecodeSums<KV, kHeadDim, kTiles> sums[kTeams];
#pragma unroll
  for (int i = 0; i < kTeams; ++i) sums[i].start();
  const int first = range.first_stage(), last = range.last_stage();
  for (int stage = first; stage <= last; stage += kTeams) {
#pragma unroll
    for (int i = 0; i < kTeams; ++i) {
      if (stage + i > last) break;
      barrier_wait(&shared.full[place.slot], place.parity);
      const int position = (stage + i) * kStageRows + warp % 4 * kSliceRows;
      const bool turn = kTeams == 2 || (stage - first) % 2 == warp / 4;
      if (turn && position < range.end && position + kSliceRows > range.begin) {
        sums[i].attend(queries, shared_address(shared.stage[place.slot]) + warp % 4 * S::kSliceBytes, position, item, range,
                       p.group, p.window, scale);
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(&shared.empty[place.slot]);
      place.advance(S::kStages);
    }
  }
  finish_decode<kOut>(p, shared, item, head, scale, sums, place);
}

}  // namespace tpserve::cuda
