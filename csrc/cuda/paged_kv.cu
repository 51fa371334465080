// store_kv and copy_pages: pure data movement, in the widest words that every address allows.
#include "paged_kv_checks.h"
#include "cuda/device.h"
#include "registration.h"

namespace llava_cot {
namespace {

using torch::stable::Tensor;

constexpr int kCopyThreads = 256;
constexpr int kInFlight = 4;  // words that a thread loads before it stores the first, to hide the latency

struct alignas(16) Word16 {
  uint32_t of[4];
};

int64_t address_of(const Tensor& tensor) { return reinterpret_cast<int64_t>(tensor.const_data_ptr()); }

// Calls visit(Word{}) with the widest word that divides all of the byte counts and addresses or-ed into `bytes`.
template <class Visitor>
void with_word(int64_t bytes, const Visitor& visit) {
  if (bytes % 16 == 0) return visit(Word16{});
  if (bytes % 8 == 0) return visit(uint64_t{});
  if (bytes % 4 == 0) return visit(uint32_t{});
  visit(uint16_t{});
}

// ---- copy_pages ----

// A block moves one piece of kCopyThreads * kInFlight words of one page of one plane.
template <class Word>
__global__ void __launch_bounds__(kCopyThreads)
    copy_pages_kernel(Word* cache, const int32_t* copies, int64_t num_copies, int64_t num_pages, int64_t page_words,
                      int64_t num_pieces) {
  const int64_t item = static_cast<int64_t>(blockIdx.x) / num_pieces, copy = item % num_copies;
  const int32_t source = load_uniform(copies + 2 * copy), target = load_uniform(copies + 2 * copy + 1);
  if (source < 0 || source >= num_pages || target < 0 || target >= num_pages) return;
  Word* plane = cache + item / num_copies * num_pages * page_words;
  const Word* from = plane + source * page_words;
  Word* to = plane + target * page_words;
  const int64_t first = static_cast<int64_t>(blockIdx.x) % num_pieces * (kCopyThreads * kInFlight) + threadIdx.x;
  Word words[kInFlight];
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    if (first + i * kCopyThreads < page_words) words[i] = load(from + first + i * kCopyThreads);
  }
#pragma unroll
  for (int i = 0; i < kInFlight; ++i) {
    if (first + i * kCopyThreads < page_words) store(to + first + i * kCopyThreads, words[i]);
  }
}

void copy_pages(Tensor kv_cache, Tensor copies) {
  CHECK_DIM(kv_cache, 6);
  CHECK_CONTIGUOUS(kv_cache);
  CHECK_DIM(copies, 2);
  CHECK_CONTIGUOUS(copies);
  CHECK_SIZE(copies, 1, 2);
  CHECK_DTYPE(copies, Int);
  const int64_t num_pages = kv_cache.size(2), num_copies = copies.size(0);
  const int64_t num_planes = kv_cache.size(0) * kv_cache.size(1);  // K and V of every layer
  const int64_t page_bytes = kv_cache.size(3) * kv_cache.size(4) * kv_cache.size(5) * kv_cache.element_size();
  if (num_copies == 0 || page_bytes == 0) return;
  const OnDeviceOf device(kv_cache);
  with_word(page_bytes | address_of(kv_cache), [&](auto word) {
    using Word = decltype(word);
    const int64_t page_words = page_bytes / static_cast<int64_t>(sizeof(Word));
    const int64_t num_pieces = (page_words - 1) / (kCopyThreads * kInFlight) + 1;
    device.run(copy_pages_kernel<Word>, {num_planes * num_copies * num_pieces, kCopyThreads},
               static_cast<Word*>(kv_cache.mutable_data_ptr()), copies.const_data_ptr<int32_t>(), num_copies, num_pages,
               page_words, num_pieces);
  });
}

// ---- store_kv ----

// A view [T, Hkv, D] with a dense last dimension; strides in words.
template <class Word>
struct TokenRows {
  const Word* data;
  int64_t token_stride, head_stride;

  explicit TokenRows(const Tensor& tensor)
      : data(static_cast<const Word*>(tensor.const_data_ptr())),
        token_stride(tensor.stride(0) * tensor.element_size() / static_cast<int64_t>(sizeof(Word))),
        head_stride(tensor.stride(1) * tensor.element_size() / static_cast<int64_t>(sizeof(Word))) {}
};

// Block 2 t moves the key of token t, block 2 t + 1 its value.
template <class Word>
__global__ void __launch_bounds__(kCopyThreads)
    store_kv_kernel(TokenRows<Word> keys, TokenRows<Word> values, Word* key_cache, Word* value_cache,
                    const int64_t* slot_mapping, int64_t num_slots, int num_heads, int head_words) {
  const int64_t token = blockIdx.x / 2, slot = load_uniform(slot_mapping + token);
  if (slot < 0 || slot >= num_slots) return;
  const bool is_key = blockIdx.x % 2 == 0;
  const Word* from = is_key ? keys.data + token * keys.token_stride : values.data + token * values.token_stride;
  const int64_t head_stride = is_key ? keys.head_stride : values.head_stride;
  Word* to = (is_key ? key_cache : value_cache) + slot * num_heads * head_words;
  for (int i = static_cast<int>(threadIdx.x); i < num_heads * head_words; i += kCopyThreads) {
    store(to + i, load(from + i / head_words * head_stride + i % head_words));
  }
}

void store_kv(Tensor key, Tensor value, Tensor key_cache, Tensor value_cache, Tensor slot_mapping) {
  const int64_t num_tokens = slot_mapping.numel();
  const int64_t num_slots = check_store(key, value, key_cache, value_cache, slot_mapping);
  const int64_t num_heads = key.size(1), item_size = key.element_size(), head_bytes = key.size(2) * item_size;
  if (num_tokens == 0 || num_heads * head_bytes == 0) return;
  int64_t bytes = head_bytes | address_of(key_cache) | address_of(value_cache);
  for (const Tensor* tokens : {&key, &value}) {
    bytes |= address_of(*tokens) | tokens->stride(0) * item_size | tokens->stride(1) * item_size;
  }
  const OnDeviceOf device(key_cache);
  with_word(bytes, [&](auto word) {
    using Word = decltype(word);
    device.run(store_kv_kernel<Word>, {2 * num_tokens, kCopyThreads}, TokenRows<Word>(key), TokenRows<Word>(value),
               static_cast<Word*>(key_cache.mutable_data_ptr()), static_cast<Word*>(value_cache.mutable_data_ptr()),
               slot_mapping.const_data_ptr<int64_t>(), num_slots, static_cast<int>(num_heads),
               static_cast<int>(head_bytes / static_cast<int64_t>(sizeof(Word))));
  });
}

}  // namespace

IMPLEMENT_CUDA_OPS(m) {
  m.impl("store_kv", TORCH_BOX(&store_kv));
  m.impl("copy_pages", TORCH_BOX(&copy_pages));
}

}  // namespace llava_cot
