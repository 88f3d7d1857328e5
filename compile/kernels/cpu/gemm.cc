// out (M, N) = x (M, K) @ w, with w packed in panels of sixteen output columns, (N / 16, K, 16).
//
// Each output element is one sequential chain of fused multiply-adds over k, whatever M is, so a row gives the same
// bits alone and in any batch. Speed comes from many chains side by side: a tile of MR rows by NP panels keeps its sums
// in registers. Rows are packed as (K, MR) per tile so that one pointer reaches all of them. For many rows, K is cut in
// blocks: the block of weights is widened to float32 once into a scratch that stays in the first-level cache, and
// the sums wait in `out` between blocks (in float32, so the chain is unbroken).
#include <algorithm>
#include <vector>

#include "common.h"

namespace tpserve {
namespace {

#if defined(__AVX512F__)
constexpr int kMaxRows = 14;     // 14 x 2 sums, 2 weights, 1 broadcast: 31 of 32 registers
constexpr int kBlockPanels = 2;  // of a tile of many rows
#else
constexpr int kMaxRows = 6;  // 6 x 2 sums, 2 weights, 1 broadcast: 15 of AVX2's 16 registers; twice that 29 of NEON's 32
constexpr int kBlockPanels = 1;
#endif
constexpr int64_t kBlockK = 256;  // kBlockPanels * 256 * 64 bytes: 32 KiB within a first-level cache of 48, or 16 within 32
constexpr int64_t kPiecesPerThread = 4;  // fine enough to share when a thread is off its core, benchmarks/cpu_kernels.py
constexpr int64_t kChunkElements = 1 << 18;  // of packed rows: 1 MiB, within a second-level cache of 2 MiB
constexpr int64_t kPrefetchBytes = 3072;  // best of 768 to 12288 for eight rows in benchmarks/cpu_kernels.py

/// Panels per tile: enough independent chains to hide the latency of an FMA (4 cycles on 2 ports).
constexpr int panels_for(int rows) {
  if (kParts == 1) return rows <= 6 ? 4 : 2;
  return rows == 1 ? 4 : rows <= 3 ? 2 : 1;
}

/// `x` is packed (K, MR); `w` points at NP panels, `panel_stride` elements apart; columns of `out` are contiguous.
template <int MR, int NP, typename W>
TPSERVE_INLINE void tile(const float* __restrict x, const W* __restrict w, int64_t panel_stride, int64_t num_k,
                         float* __restrict out, int64_t ldo, bool resume, const float* __restrict bias) {
  constexpr int kWide = NP * kParts;
  part sum[MR][kWide];
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 16
    for (int p = 0; p < kWide; ++p) sum[m][p] = resume ? load_part(out + m * ldo + p * kPartLanes) : part{};
  }
  for (int64_t k = 0; k < num_k; ++k) {
    part weight[kWide];
#pragma GCC unroll 16
    for (int p = 0; p < kWide; ++p) {
      const W* row = w + p / kParts * panel_stride + k * kLanes + p % kParts * kPartLanes;
      if (p % kParts == 0) __builtin_prefetch(reinterpret_cast<const char*>(row) + kPrefetchBytes);
      weight[p] = load_part(row);
    }
#pragma GCC unroll 16
    for (int m = 0; m < MR; ++m) {
      const part value = splat_part(x[k * MR + m]);
#pragma GCC unroll 16
      for (int p = 0; p < kWide; ++p) sum[m][p] += value * weight[p];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < MR; ++m) {
#pragma GCC unroll 16
    for (int p = 0; p < kWide; ++p) {
      part result = sum[m][p];
      if (bias != nullptr) result += load_part(bias + p * kPartLanes);
      store_part(out + m * ldo + p * kPartLanes, result);
    }
  }
}

template <typename W>
using TileFunction = void (*)(const float*, const W*, int64_t, int64_t, float*, int64_t, bool, const float*);

template <int MR, int NP, typename W>
__attribute__((noinline)) void tile_entry(const float* x, const W* w, int64_t panel_stride, int64_t num_k, float* out,
                                          int64_t ldo, bool resume, const float* bias) {
  tile<MR, NP, W>(x, w, panel_stride, num_k, out, ldo, resume, bias);
}

template <typename W, int NP, int... MR>
constexpr TileFunction<W> pick(int rows, std::integer_sequence<int, MR...>) {
  constexpr TileFunction<W> table[] = {tile_entry<MR + 1, (NP < panels_for(MR + 1) ? NP : panels_for(MR + 1)), W>...};
  return table[rows - 1];
}

/// The function for `rows` rows and `panels` panels (1, 2 or 4, at most panels_for(rows)).
template <typename W>
TileFunction<W> tile_for(int rows, int panels) {
  using Rows = std::make_integer_sequence<int, kMaxRows>;
  return panels == 4 ? pick<W, 4>(rows, Rows{}) : panels == 2 ? pick<W, 2>(rows, Rows{}) : pick<W, 1>(rows, Rows{});
}

/// Rows [begin(i), begin(i + 1)) form tile i; sizes differ by at most one.
struct RowTiles {
  int64_t num_rows, count;

  explicit RowTiles(int64_t m) : num_rows(m), count((m + kMaxRows - 1) / kMaxRows) {}
  int64_t begin(int64_t i) const { return i * (num_rows / count) + std::min(i, num_rows % count); }
};

/// Copies rows [first, last) of x (M, K) into (K, last - first).
void pack_rows(const float* x, int64_t num_k, int64_t first, int64_t last, float* packed) {
  const int64_t rows = last - first;
  constexpr int64_t kBlock = 64;  // the part of `packed` being filled stays in the first-level cache
  for (int64_t begin = 0; begin < num_k; begin += kBlock) {
    const int64_t end = std::min(num_k, begin + kBlock);
    for (int64_t m = 0; m < rows; ++m) {
      const float* row = x + (first + m) * num_k;
      for (int64_t k = begin; k < end; ++k) packed[k * rows + m] = row[k];
    }
  }
}

/// Panels [p, p_end) for one or two tiles of rows: weights are read straight from memory, once.
template <typename W>
void stream_panels(const float* packed, const RowTiles& tiles, const W* w, int64_t p, int64_t p_end, int64_t num_k,
                   float* out, int64_t ldo, const float* bias) {
  const int rows = static_cast<int>(tiles.begin(1));
  while (p < p_end) {
    int width = panels_for(rows);
    while (width > p_end - p) width /= 2;
    for (int64_t i = 0; i < tiles.count; ++i) {
      const int64_t m = tiles.begin(i);
      const int tile_rows = static_cast<int>(tiles.begin(i + 1) - m);
      tile_for<W>(tile_rows, width)(packed + m * num_k, w + p * num_k * kLanes, num_k * kLanes, num_k,
                                    out + m * ldo + p * kLanes, ldo, false, bias ? bias + p * kLanes : nullptr);
    }
    p += width;
  }
}

/// Panels [first, last) for many tiles: widened weights of one K block are reused by every tile of a chunk of rows, and
/// the chunk's rows, which stay in the second-level cache, by every panel.
template <typename W>
void block_panels(const float* packed, const RowTiles& tiles, const W* w, int64_t first, int64_t last, int64_t num_k,
                  float* out, int64_t ldo, const float* bias) {
  alignas(64) float scratch[kBlockPanels * kBlockK * kLanes];
  const int64_t chunk_tiles = std::max<int64_t>(4, kChunkElements / (kMaxRows * num_k));
  for (int64_t chunk = 0; chunk < tiles.count; chunk += chunk_tiles) {
    const int64_t chunk_end = std::min(tiles.count, chunk + chunk_tiles);
    for (int64_t p = first; p < last;) {
      const int width = static_cast<int>(std::min<int64_t>(kBlockPanels, last - p));
      for (int64_t k = 0; k < num_k; k += kBlockK) {
        const int64_t depth = std::min(kBlockK, num_k - k);
        for (int i = 0; i < width; ++i) {
          const W* source = w + ((p + i) * num_k + k) * kLanes;
          float* target = scratch + i * kBlockK * kLanes;
          for (int64_t j = 0; j < depth; ++j) store(target + j * kLanes, load(source + j * kLanes));
        }
        const float* final_bias = bias && k + depth == num_k ? bias + p * kLanes : nullptr;
        for (int64_t i = chunk; i < chunk_end; ++i) {
          const int64_t m = tiles.begin(i), m_end = tiles.begin(i + 1);
          float* sums = out + p * kLanes;
          const int64_t next_end = i + 1 < chunk_end ? tiles.begin(i + 2) : m_end;
          for (int64_t next = m_end; next < next_end; ++next) {
            __builtin_prefetch(sums + next * ldo, 1);
            if (width == 2) __builtin_prefetch(sums + next * ldo + kLanes, 1);
          }
          tile_for<float>(static_cast<int>(m_end - m), width)(packed + m * num_k + k * (m_end - m), scratch,
                                                              kBlockK * kLanes, depth, sums + m * ldo, ldo, k != 0,
                                                              final_bias);
        }
      }
      p += width;
    }
  }
}

template <typename W>
void multiply(const float* x, const W* w, float* out, int64_t num_m, int64_t num_panels, int64_t num_k,
              const float* bias) {
  if (num_m == 0) return;
  const RowTiles tiles(num_m);
  const int64_t num_n = num_panels * kLanes;
  // Kept between calls; belongs to the calling thread, which outlives the team it starts.
  static thread_local std::vector<float> scratch;
  if (num_m > 1) scratch.resize(static_cast<size_t>(std::max<int64_t>(scratch.size(), num_m * num_k)));
  float* const buffer = scratch.data();
  const float* const packed = num_m > 1 ? buffer : x;
  const int threads = num_threads(num_m * num_n * num_k, num_panels);
  if (num_m > 1) {
    parallel_for(tiles.count, threads, [&](int64_t i) {
      pack_rows(x, num_k, tiles.begin(i), tiles.begin(i + 1), buffer + tiles.begin(i) * num_k);
    });
  }
  // Pieces are whole groups of four panels, so that only the last one meets the narrow tail.
  const int64_t groups = (num_panels + 3) / 4;
  const int64_t piece = std::max<int64_t>(1, groups / (kPiecesPerThread * threads));
  parallel_pieces(groups, piece, threads, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * 4, last = std::min(num_panels, end * 4);
    if (tiles.count <= 2) {
      stream_panels(packed, tiles, w, first, last, num_k, out, num_n, bias);
    } else {
      block_panels(packed, tiles, w, first, last, num_k, out, num_n, bias);
    }
  });
}

void run(const TensorView& x, const TensorView& w, const TensorView& out, const float* bias) {
  check_rank("x", x, 2);
  check_rank("w", w, 3);
  const int64_t num_m = x.size(0), num_k = x.size(1), num_panels = w.size(0);
  const float* px = checked<float>("x", x, {num_m, num_k});
  float* po = checked<float>("out", out, {num_m, num_panels * kLanes});
  if (has_dtype<bf16>(w)) {
    multiply(px, checked<bf16>("w", w, {-1, num_k, kLanes}), po, num_m, num_panels, num_k, bias);
  } else {
    multiply(px, checked<float>("w", w, {-1, num_k, kLanes}), po, num_m, num_panels, num_k, bias);
  }
}

void gemm(TensorView x, TensorView w, TensorView out) { run(x, w, out, nullptr); }

void gemm_bias(TensorView x, TensorView w, TensorView bias, TensorView out) {
  check_rank("w", w, 3);
  run(x, w, out, checked<float>("bias", bias, {w.size(0) * kLanes}));
}

TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm, gemm);
TVM_FFI_DLL_EXPORT_TYPED_FUNC(gemm_bias, gemm_bias);

}  // namespace
}  // namespace tpserve
