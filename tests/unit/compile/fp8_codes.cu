// The conversions of fp8.cuh on the host, for test_kv_layout.py.
#include "fp8.cuh"

extern "C" {
__attribute__((visibility("default"))) void narrow(const float* values, int count, uint32_t* codes) {
  for (int i = 0; i < count / 4; ++i, values += 4) {
    codes[i] = tpserve::cuda::pack4_fp8(values[0], values[1], values[2], values[3]);
  }
}

__attribute__((visibility("default"))) void widen(const uint16_t* codes, int count, uint32_t* halves) {
  for (int i = 0; i < count; ++i) halves[i] = tpserve::cuda::widen2(codes[i]);
}
}
