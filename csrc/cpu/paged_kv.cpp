// store_kv and copy_pages: pure data movement, so everything is handled as bytes.
#include "paged_kv_checks.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <cstring>

namespace llava_cot {
namespace {

using torch::stable::Tensor;

constexpr int64_t GRAIN_BYTES = 64 * 1024;  // below this a thread costs more to wake than it saves

int64_t grain(int64_t bytes_per_item) { return GRAIN_BYTES / (bytes_per_item + 1) + 1; }

// A view [T, Hkv, D] with a dense last dimension; strides in bytes.
struct TokenRows {
  const char* data;
  int64_t token_stride, head_stride;

  TokenRows(const Tensor& tensor, int64_t item_size)
      : data(static_cast<const char*>(tensor.const_data_ptr())),
        token_stride(tensor.stride(0) * item_size),
        head_stride(tensor.stride(1) * item_size) {}

  void copy_token(int64_t token, int64_t num_heads, int64_t head_bytes, char* target) const {
    const char* source = data + token * token_stride;
    if (head_stride == head_bytes) {
      std::memcpy(target, source, num_heads * head_bytes);
      return;
    }
    for (int64_t head = 0; head < num_heads; ++head) {
      std::memcpy(target + head * head_bytes, source + head * head_stride, head_bytes);
    }
  }
};

void store_kv(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor slot_mapping) {
  const int64_t num_tokens = slot_mapping.numel();
  const int64_t num_slots = check_store(key, value, key_cache, value_cache, slot_mapping);
  const int64_t* slots = slot_mapping.const_data_ptr<int64_t>();
  for (int64_t token = 0; token < num_tokens; ++token) {
    STD_TORCH_CHECK(-1 <= slots[token] && slots[token] < num_slots, "slot_mapping must be in [-1, ", num_slots - 1,
                    "], got ", slots[token]);
  }

  const int64_t num_heads = key.size(1), item_size = key.element_size();
  const int64_t head_bytes = key.size(2) * item_size, token_bytes = num_heads * head_bytes;
  const TokenRows keys(key, item_size), values(value, item_size);
  char* key_slots = static_cast<char*>(key_cache.mutable_data_ptr());
  char* value_slots = static_cast<char*>(value_cache.mutable_data_ptr());
  torch::stable::parallel_for(0, num_tokens, grain(2 * token_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      if (slots[token] == -1) continue;
      keys.copy_token(token, num_heads, head_bytes, key_slots + slots[token] * token_bytes);
      values.copy_token(token, num_heads, head_bytes, value_slots + slots[token] * token_bytes);
    }
  });
}

void copy_pages(Tensor kv_cache, Tensor copies) {
  CHECK_DIM(kv_cache, 6);
  CHECK_CONTIGUOUS(kv_cache);
  CHECK_DIM(copies, 2);
  CHECK_CONTIGUOUS(copies);
  CHECK_SIZE(copies, 1, 2);
  const int64_t num_pages = kv_cache.size(2), num_copies = copies.size(0);
  const int64_t num_planes = kv_cache.size(0) * kv_cache.size(1);  // K and V of every layer
  const int64_t page_bytes = kv_cache.size(3) * kv_cache.size(4) * kv_cache.size(5) * kv_cache.element_size();
  const int32_t* pages = copies.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < 2 * num_copies; ++i) {
    STD_TORCH_CHECK(0 <= pages[i] && pages[i] < num_pages, "copies must be in [0, ", num_pages - 1, "], got ",
                    pages[i]);
  }

  char* data = static_cast<char*>(kv_cache.mutable_data_ptr());
  torch::stable::parallel_for(0, num_planes * num_copies, grain(page_bytes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      char* plane = data + i / num_copies * num_pages * page_bytes;
      const int32_t* copy = pages + 2 * (i % num_copies);
      // memmove, since a caller's (p, p) must be harmless
      std::memmove(plane + copy[1] * page_bytes, plane + copy[0] * page_bytes, page_bytes);
    }
  });
}

}  // namespace
}  // namespace llava_cot

STABLE_TORCH_LIBRARY_IMPL(llava_cot_kernels, CPU, m) {
  m.impl("store_kv", TORCH_BOX(&llava_cot::store_kv));
  m.impl("copy_pages", TORCH_BOX(&llava_cot::copy_pages));
}
