// The lanes of rope.cu and attention.cu one after the other on the host, over e4m3 pages, for test_kv_layout.py.
#include <cstring>

#include "kv_layout.cuh"

using namespace tpserve::cuda;

namespace {

/// As `quantize8` and the stores behind it: a lane for each eight dimensions of the first half, and their partners.
template <int kHeadDim>
void append_row(uint8_t* pages, int num_rows, int row, bool is_value, const uint8_t* codes) {
  for (int lane = 0; lane < kHeadDim / 16; ++lane) {
    const bool upper = lane % 2 != 0;
    for (int part = 0; part < 2; ++part) {
      const int d = lane * 8 + part * kHeadDim / 2, partners_d = (lane ^ 1) * 8 + part * kHeadDim / 2;
      uint32_t words[2], theirs[2], stored[2];
      std::memcpy(words, codes + d, 8), std::memcpy(theirs, codes + partners_d, 8);
      arrange_half(words, word_for_partner(theirs, !upper), upper, is_value, stored);
      std::memcpy(pages + Panels<1, kHeadDim>::chunk_at(num_rows, row, d) + (upper ? 8 : 0), stored, 8);
    }
  }
}

/// ldmatrix.x4 of 16-bit items: lane l gives the address of row l % 8 of matrix l / 8, and gets of each matrix items
/// 2 * (l % 4) and the next of row l / 4; transposed, items l / 4 of rows 2 * (l % 4) and the next.
void load_matrices(const uint8_t* slice, const int (&address)[32], bool transposed, int lane, uint32_t (&words)[4]) {
  for (int matrix = 0; matrix < 4; ++matrix) {
    uint16_t pair[2];
    for (int i = 0; i < 2; ++i) {
      const int row = transposed ? lane % 4 * 2 + i : lane / 4, item = transposed ? lane / 4 : lane % 4 * 2 + i;
      std::memcpy(&pair[i], slice + address[matrix * 8 + row] + item * 2, 2);
    }
    words[matrix] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
  }
}

/// Codes by (chunk, lane, register): what `Fragments<fp8>` widens.
template <int kHeadDim>
void fragments(const uint8_t* slice, bool is_value, uint16_t* out, int32_t* addresses) {
  for (int d = 0; d < kHeadDim; d += 32) {
    int address[32];
    for (int lane = 0; lane < 32; ++lane) {
      using P = Panels<1, kHeadDim>;
      address[lane] = is_value ? P::values_of_lane(lane, d) : P::keys_of_lane(lane, d);
      addresses[d + lane] = address[lane];
    }
    for (int lane = 0; lane < 32; ++lane) {
      uint32_t words[4];
      load_matrices(slice, address, is_value, lane, words);
      for (int column = 0; column < 2; ++column) {
        for (int i = 0; i < 4; ++i) {
          const uint32_t codes = is_value ? value_codes(words, column, i) : key_codes(words, column, i);
          out[((d / 16 + column) * 32 + lane) * 4 + i] = static_cast<uint16_t>(codes);
        }
      }
    }
  }
}

}  // namespace

extern "C" {
void append(int head_dim, uint8_t* pages, int num_rows, int row, int is_value, const uint8_t* codes) {
  (head_dim == 128 ? append_row<128> : append_row<64>)(pages, num_rows, row, is_value != 0, codes);
}

void load(int head_dim, const uint8_t* slice, int is_value, uint16_t* out, int32_t* addresses) {
  (head_dim == 128 ? fragments<128> : fragments<64>)(slice, is_value != 0, out, addresses);
}

int bf16_offset(int head_dim, int num_rows, int row, int d) {
  return (head_dim == 128 ? Panels<2, 128>::chunk_at : Panels<2, 64>::chunk_at)(num_rows, row, d) + d % 8;
}
}
