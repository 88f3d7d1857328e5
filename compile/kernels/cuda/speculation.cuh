// What the kernels of a speculating replica take: the slots' state, and decoding slots as a step lays them out.
#pragma once

#include "common.cuh"
#include "speculation_rows.cuh"

namespace tpserve::cuda {

inline SlotState state_of(const TensorView& tokens, const TensorView& num_tokens, const TensorView& max_len,
                          const TensorView& draft_tokens) {
  check_rank("tokens", tokens, 2);
  check_rank("draft_tokens", draft_tokens, 2);
  const int64_t slots = tokens.size(0);
  return {checked<int32_t>("tokens", tokens, {slots, -1}), checked<int32_t>("num_tokens", num_tokens, {slots}),
          checked<int32_t>("max_len", max_len, {slots}), checked<int32_t>("draft_tokens", draft_tokens, {slots, -1}),
          static_cast<int>(tokens.size(1)), static_cast<int>(draft_tokens.size(1))};
}

inline int64_t batch_of(const TensorView& decode_slots, int64_t stride) {
  if (stride < 1) TVM_FFI_THROW(ValueError) << "a stride of " << stride;
  return decode_slots.size(0) / stride;
}

}  // namespace tpserve::cuda
