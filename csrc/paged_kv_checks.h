// The checks of store_kv's tensors that memory safety needs on every device.
#pragma once

#include "checks.h"

namespace llava_cot {

inline void check_tokens(const torch::stable::Tensor& tokens, const torch::stable::Tensor& cache, int64_t num_tokens) {
  STD_TORCH_CHECK(tokens.scalar_type() == cache.scalar_type(), "keys, values and their caches must share a dtype");
  CHECK_CONTIGUOUS(cache);
  CHECK_DIM(tokens, 3);
  CHECK_DIM(cache, 4);
  CHECK_SIZE(tokens, 0, num_tokens);
  CHECK_SIZE(tokens, 1, cache.size(2));
  CHECK_SIZE(tokens, 2, cache.size(3));
  STD_TORCH_CHECK(tokens.size(2) <= 1 || tokens.stride(2) == 1, "keys and values must have stride 1 in dimension 2");
}

// Returns the number of slots.
inline int64_t check_store(const torch::stable::Tensor& key, const torch::stable::Tensor& value,
                           const torch::stable::Tensor& key_cache, const torch::stable::Tensor& value_cache,
                           const torch::stable::Tensor& slot_mapping) {
  CHECK_VECTOR(slot_mapping, slot_mapping.numel(), Long);
  check_tokens(key, key_cache, slot_mapping.size(0));
  check_tokens(value, value_cache, slot_mapping.size(0));
  const int64_t num_slots = key_cache.size(0) * key_cache.size(1);
  STD_TORCH_CHECK(value_cache.size(0) * value_cache.size(1) == num_slots, "key_cache and value_cache must be alike");
  return num_slots;
}

}  // namespace llava_cot
