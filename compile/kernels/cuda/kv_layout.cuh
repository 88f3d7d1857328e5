// How the keys and values of a page and head are laid out; plain functions, so that the host's tests run them too.
//
// Keys and values are panels of (page_size, kRowBytes) each. A row of a panel is made of 16-byte chunks, and chunk c of
// row r stands at place c ^ swizzle(r): eight rows of a chunk lie in eight different sets of shared memory's banks.
//   bfloat16: head_dim / 64 panels with rows of 128 bytes; a chunk is eight dimensions in their order.
//   e4m3:     one panel with rows of head_dim bytes; a chunk is sixteen dimensions, in the order in which the fragments
//             of mma.sync take them. A thread that loads four bytes of a chunk has
//     of keys:   dimensions 2j, 2j + 1, 2j + 8, 2j + 9, the two halves of a column of sixteen;
//     of values: two dimensions of two positions (transposed): d, d + 8, one for each of two columns of eight.
#pragma once

#include <cstdint>

#ifdef __CUDACC__
#define TPSERVE_LAYOUT __host__ __device__ __forceinline__
#else
#define TPSERVE_LAYOUT inline
#endif

namespace tpserve::cuda {

constexpr int kSliceRows = 16;  // positions fetched together; page_size is a multiple of it

/// Panels of the keys (or values) of a head with items of `kItemBytes`.
template <int kItemBytes, int kHeadDim>
struct Panels {
  static constexpr int kRowBytes = kHeadDim * kItemBytes < 128 ? kHeadDim * kItemBytes : 128;
  static constexpr int kCount = kHeadDim * kItemBytes / kRowBytes;
  static constexpr int kSliceBytes = kSliceRows * kRowBytes;  // of one panel

  static TPSERVE_LAYOUT int swizzle(int row) { return row / (128 / kRowBytes) % (kRowBytes / 16); }

  /// Items from the start of the first panel, of `num_rows` rows, to the chunk of a row that has dimension d.
  static TPSERVE_LAYOUT int chunk_at(int num_rows, int row, int d) {
    constexpr int kWidth = kRowBytes / kItemBytes, kItems = 16 / kItemBytes;  // of a row and of a chunk
    return (d / kWidth * num_rows + row) * kWidth + (d / kItems % (kRowBytes / 16) ^ swizzle(row)) * kItems;
  }

  /// Of e4m3: where a lane of a warp points ldmatrix in a slice's keys, for the two chunks from dimension d. The four
  /// words that it gets are positions 0 to 7 of each chunk, then positions 8 to 15.
  static TPSERVE_LAYOUT int keys_of_lane(int lane, int d) {
    return chunk_at(kSliceRows, lane / 16 * 8 + lane % 8, d + lane / 8 % 2 * 16);
  }

  /// The same in its values, transposed: positions 0 to 7 and 8 to 15 of the first chunk, then of the second.
  static TPSERVE_LAYOUT int values_of_lane(int lane, int d) {
    return chunk_at(kSliceRows, lane / 8 % 2 * 8 + lane % 8, d + lane / 16 * 16);
  }
};

/// Four bytes of two words: nibble i of the selector is the place of byte i, 0 to 3 in `a` and 4 to 7 in `b`.
TPSERVE_LAYOUT uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
#ifdef __CUDA_ARCH__
  return __byte_perm(a, b, selector);
#else
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<uint32_t>(both >> (selector >> i * 4 & 7) * 8 & 0xFF) << i * 8;
  return result;
#endif
}

/// Which of its two words a thread gives to its partner, who has the other eight dimensions of a chunk.
TPSERVE_LAYOUT uint32_t word_for_partner(const uint32_t (&words)[2], bool upper) { return upper ? words[0] : words[1]; }

/// Half a chunk of e4m3, in its stored order.
///
/// A thread has eight of its sixteen dimensions, the lower or the upper ones, and one word of its partner's. It gets
/// the eight bytes to store at the chunk's start (the thread of the lower dimensions) or eight bytes later.
TPSERVE_LAYOUT void arrange_half(const uint32_t (&words)[2], uint32_t partners, bool upper, bool is_value,
                                 uint32_t (&stored)[2]) {
  const uint32_t low = upper ? partners : words[0], high = upper ? words[1] : partners;
  stored[0] = permute_bytes(low, high, is_value ? 0x5140 : 0x5410);
  stored[1] = permute_bytes(low, high, is_value ? 0x7362 : 0x7632);
}

/// The two codes of a register of mma.sync's second operand, from the words of `keys_of_lane`: registers 0 and 1 are of
/// positions 0 to 7, 2 and 3 of positions 8 to 15; `column` is the chunk.
TPSERVE_LAYOUT uint32_t key_codes(const uint32_t (&words)[4], int column, int i) {
  return words[i / 2 * 2 + column] >> i % 2 * 16 & 0xFFFF;
}

/// The same of values: registers 0 and 1 are of a chunk's dimensions 0 to 7, 2 and 3 of dimensions 8 to 15.
TPSERVE_LAYOUT uint32_t value_codes(const uint32_t (&words)[4], int column, int i) {
  const uint32_t by_dimension = permute_bytes(words[column * 2 + i % 2], 0, 0x3120);
  return by_dimension >> i / 2 * 16 & 0xFFFF;
}

}  // namespace tpserve::cuda
