// paged_attention and shared_attention: one online softmax over blocks of keys serves both.
//
// A work item is a tile of query rows that read the same keys of one kv head. A row is a (query token, query head)
// pair; 16 rows advance together, one per vector lane, so that a key is loaded once for all of them and no sum crosses
// lanes. Rows of several sequences are stacked while they read a shared prefix. Then each sequence continues in its own
// pages. Blocks always start at multiples of KEY_BLOCK from the first key of a sequence. So neither the tile, the
// prefix nor the number of threads changes a bit of the result. A block is cut where a window begins: a key that no row
// sees would add 0 to each sum.
#include "checks.h"
#include "cpu/attention_tile.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <numeric>
#include <optional>
#include <utility>
#include <vector>

namespace llava_cot {
namespace {

using torch::stable::Tensor;

Rows strided_rows(const Tensor& tensor) {
  const int64_t item_size = tensor.element_size();
  return {static_cast<const char*>(tensor.const_data_ptr()), tensor.stride(0) * item_size,
          tensor.stride(1) * item_size};
}

// Computed from the sizes: a dimension of size 1 may have any stride, even in a contiguous tensor.
Rows cache_rows(const Tensor& cache) {
  const int64_t head_bytes = cache.size(3) * static_cast<int64_t>(cache.element_size());
  return {static_cast<const char*>(cache.const_data_ptr()), cache.size(2) * head_bytes, head_bytes};
}

// Not inlined: otherwise its address would be looked up again at every use.
__attribute__((noinline)) Scratch& thread_scratch() {
  static thread_local Scratch scratch;
  return scratch;
}

void run(const Call& call, Plan& plan) {
  constexpr int64_t WORKER_COST = 1 << 20;  // multiply-adds that are worth waking a thread for
  int64_t cost = 0;
  for (const Query& query : plan.queries) cost += (query.limit - query.first) * call.num_heads * call.head_dim;
  const int64_t num_workers = std::min<int64_t>(torch::stable::get_num_threads(), 1 + cost / WORKER_COST);
  const int64_t num_kv_heads = call.num_heads / call.heads_per_kv;
  int64_t rows_per_tile = MAX_SLABS * LANES;
  plan.cut(call.heads_per_kv, rows_per_tile);
  while (static_cast<int64_t>(plan.tiles.size()) * num_kv_heads < num_workers && rows_per_tile > LANES) {
    plan.cut(call.heads_per_kv, rows_per_tile /= 2);
  }
  // Workers take tiles one by one, since the later tiles of a causal chunk cost more. They start at the back, so that
  // the small tiles come last.
  const int64_t num_tiles = static_cast<int64_t>(plan.tiles.size()), num_items = num_tiles * num_kv_heads;
  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, std::min(num_workers, num_items), 1, [&](int64_t, int64_t) {
    Scratch& scratch = thread_scratch();
    for (int64_t item; (item = next++) < num_items;) {
      run_tile(call, plan, plan.tiles[num_tiles - 1 - item % num_tiles], item / num_tiles, scratch);
    }
  });
}

void check_tensors(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out, const Tensor& lse) {
  CHECK_DIM(query, 3);
  CHECK_DIM(out, 3);
  CHECK_DIM(lse, 2);
  for (int64_t axis = 0; axis < 3; ++axis) CHECK_SIZE(out, axis, query.size(axis));
  for (int64_t axis = 0; axis < 2; ++axis) CHECK_SIZE(lse, axis, query.size(axis));
  CHECK_CONTIGUOUS(out);
  CHECK_CONTIGUOUS(lse);
  CHECK_DTYPE(lse, Float);
  const auto dtype = query.scalar_type();
  STD_TORCH_CHECK(key.scalar_type() == dtype && value.scalar_type() == dtype && out.scalar_type() == dtype,
                  "query, keys, values and out must share a dtype");
  const int64_t heads_dim = key.dim() - 2, head_dim = query.size(2);
  STD_TORCH_CHECK(key.size(heads_dim) > 0 && query.size(1) % key.size(heads_dim) == 0,
                  "query must have a multiple of the kv heads, ", key.size(heads_dim), ", got ", query.size(1));
  CHECK_SIZE(key, heads_dim + 1, head_dim);
  for (int64_t axis = 0; axis < key.dim(); ++axis) CHECK_SIZE(value, axis, key.size(axis));
  STD_TORCH_CHECK(head_dim <= 1 || (query.stride(2) == 1 && key.stride(heads_dim + 1) == 1 &&
                                    value.stride(heads_dim + 1) == 1),
                  "query, keys and values must have stride 1 in their last dimension");
}

// Reads and checks the sequences. Afterwards every key that a query sees is inside the cache.
void plan_sequences(Plan& plan, const Tensor& page_table, const Tensor& seq_lens, const Tensor& cu_seqlens_q,
                    int64_t num_tokens, int64_t num_pages, int64_t page_size) {
  const int64_t num_sequences = seq_lens.size(0), row_stride = page_table.stride(0);
  const int32_t* table = page_table.const_data_ptr<int32_t>();
  const int32_t* lens = seq_lens.const_data_ptr<int32_t>();
  const int32_t* starts = cu_seqlens_q.const_data_ptr<int32_t>();
  STD_TORCH_CHECK(starts[0] == 0 && starts[num_sequences] == num_tokens, "cu_seqlens_q must go from 0 to ", num_tokens);
  for (int64_t sequence = 0; sequence < num_sequences; ++sequence) {
    const int32_t* pages = table + sequence * row_stride;
    STD_TORCH_CHECK(starts[sequence] <= starts[sequence + 1], "cu_seqlens_q must not decrease");
    STD_TORCH_CHECK(0 <= lens[sequence] && lens[sequence] <= page_table.size(1) * page_size,
                    "seq_lens must fit page_table, got ", lens[sequence]);
    for (int64_t i = 0; i * page_size < lens[sequence]; ++i) {
      STD_TORCH_CHECK(0 <= pages[i] && pages[i] < num_pages, "page_table must be in [0, ", num_pages - 1, "], got ",
                      pages[i]);
    }
    plan.sequences.push_back({pages, 0});
  }
}

// Stacks the sequences [begin, end) over the leading pages that their tables have in common.
void plan_unit(Plan& plan, const int64_t* begin, const int64_t* end, const int32_t* lens, const int32_t* starts,
               int64_t prefix_len, int64_t page_size, int64_t window) {
  const int64_t leader = *std::max_element(begin, end, [&](int64_t a, int64_t b) { return lens[a] < lens[b]; });
  Unit unit{static_cast<int64_t>(plan.queries.size()), 0, leader, 0};
  prefix_len = std::clamp<int64_t>(prefix_len, 0, lens[leader]);
  int64_t common = ceil_div(prefix_len, page_size);
  for (; begin < end; ++begin) {
    const int64_t sequence = *begin, num_queries = starts[sequence + 1] - starts[sequence];
    const int64_t used = std::min(common, ceil_div(lens[sequence], page_size));
    const int32_t* pages = plan.sequences[sequence].pages;
    const int64_t same = std::mismatch(pages, pages + used, plan.sequences[leader].pages).first - pages;
    if (same < used) common = same;
    for (int64_t i = 0; i < num_queries; ++i) {
      const int64_t limit = std::max<int64_t>(lens[sequence] - num_queries + i + 1, 0);
      const int64_t first = window ? std::max<int64_t>(limit - window, 0) : 0;
      plan.queries.push_back({starts[sequence] + i, sequence, first, limit});
    }
  }
  unit.end = static_cast<int64_t>(plan.queries.size());
  unit.shared = std::min(prefix_len, common * page_size) / KEY_BLOCK * KEY_BLOCK;
  plan.units.push_back(unit);
}

// Makes one unit for each group, and one for each sequence without a group.
void plan_units(Plan& plan, const int32_t* groups, const int32_t* prefix_lens, const int32_t* lens,
                const int32_t* starts, int64_t page_size, int64_t window) {
  std::vector<int64_t>& order = plan.order;
  order.resize(plan.sequences.size());
  std::iota(order.begin(), order.end(), 0);
  if (groups) {  // not stable_sort, which allocates
    std::sort(order.begin(), order.end(),
              [&](int64_t a, int64_t b) { return std::pair(groups[a], a) < std::pair(groups[b], b); });
  }
  const int64_t *begin = order.data(), *stop = begin + order.size();
  for (const int64_t* end; begin < stop; begin = end) {
    end = begin + 1;
    const int32_t group = groups ? groups[*begin] : -1;
    while (group >= 0 && end < stop && groups[*end] == group) ++end;
    plan_unit(plan, begin, end, lens, starts, end - begin > 1 ? prefix_lens[group] : 0, page_size, window);
  }
}

void paged_attention(Tensor query, Tensor key_cache, Tensor value_cache, Tensor page_table, Tensor seq_lens,
                     Tensor cu_seqlens_q, std::optional<Tensor> prefix_group, std::optional<Tensor> prefix_lens,
                     double softmax_scale, int64_t window, Tensor out, Tensor lse) {
  CHECK_DIM(key_cache, 4);
  CHECK_DIM(value_cache, 4);
  CHECK_CONTIGUOUS(key_cache);
  CHECK_CONTIGUOUS(value_cache);
  check_tensors(query, key_cache, value_cache, out, lse);
  const int64_t num_sequences = seq_lens.numel(), page_size = key_cache.size(1);
  CHECK_DIM(page_table, 2);
  CHECK_SIZE(page_table, 0, num_sequences);
  CHECK_CONTIGUOUS(seq_lens);
  CHECK_CONTIGUOUS(cu_seqlens_q);
  STD_TORCH_CHECK(cu_seqlens_q.numel() == num_sequences + 1, "cu_seqlens_q must have ", num_sequences + 1, " entries");
  STD_TORCH_CHECK(page_table.size(1) <= 1 || page_table.stride(1) == 1, "page_table must have stride 1 in dimension 1");
  STD_TORCH_CHECK(page_size > 0, "key_cache must have pages of at least one token");
  STD_TORCH_CHECK(window >= 0, "window must be >= 0, got ", window);
  const int32_t *groups = nullptr, *prefixes = nullptr;
  if (prefix_group) {
    CHECK_CONTIGUOUS(*prefix_group);
    CHECK_SIZE(*prefix_group, 0, num_sequences);
    STD_TORCH_CHECK(prefix_lens.has_value(), "prefix_group needs prefix_lens");
    CHECK_CONTIGUOUS(*prefix_lens);
    groups = prefix_group->const_data_ptr<int32_t>();
    prefixes = prefix_lens->const_data_ptr<int32_t>();
    for (int64_t i = 0; i < num_sequences; ++i) {
      STD_TORCH_CHECK(-1 <= groups[i] && groups[i] < prefix_lens->numel(), "prefix_group must be in [-1, ",
                      prefix_lens->numel() - 1, "], got ", groups[i]);
    }
  }

  static thread_local Plan plan;
  plan.clear();
  plan_sequences(plan, page_table, seq_lens, cu_seqlens_q, query.size(0), key_cache.size(0), page_size);
  plan_units(plan, groups, prefixes, seq_lens.const_data_ptr<int32_t>(), cu_seqlens_q.const_data_ptr<int32_t>(),
             page_size, window);
  const Call call{dtype_of(query, "query"), strided_rows(query), cache_rows(key_cache), cache_rows(value_cache),
                  out.mutable_data_ptr(), lse.mutable_data_ptr<float>(), query.size(1),
                  query.size(1) / key_cache.size(2), query.size(2), page_size, static_cast<float>(softmax_scale)};
  run(call, plan);
}

void shared_attention(Tensor query, Tensor key, Tensor value, Tensor group, Tensor cu_seqlens_k, double softmax_scale,
                      Tensor out, Tensor lse) {
  CHECK_DIM(key, 3);
  CHECK_DIM(value, 3);
  check_tensors(query, key, value, out, lse);
  CHECK_CONTIGUOUS(group);
  CHECK_CONTIGUOUS(cu_seqlens_k);
  const int64_t num_rows = query.size(0), num_groups = cu_seqlens_k.numel() - 1;
  STD_TORCH_CHECK(num_groups >= 0, "cu_seqlens_k must have at least one entry");
  STD_TORCH_CHECK(group.numel() == num_rows, "group must have ", num_rows, " entries, got ", group.numel());
  const int32_t* groups = group.const_data_ptr<int32_t>();
  const int64_t* starts = cu_seqlens_k.const_data_ptr<int64_t>();

  static constexpr int32_t ONLY_PAGE = 0;
  static thread_local Plan plan;
  plan.clear();
  for (int64_t i = 0; i < num_groups; ++i) {
    STD_TORCH_CHECK(0 <= starts[i] && starts[i] <= starts[i + 1] && starts[i + 1] <= key.size(0),
                    "cu_seqlens_k must not decrease and be in [0, ", key.size(0), "]");
    plan.sequences.push_back({&ONLY_PAGE, starts[i]});
  }
  plan.sequences.push_back({&ONLY_PAGE, 0});  // for the idle rows, which see no key of it
  for (int64_t row = 0; row < num_rows; ++row) {
    STD_TORCH_CHECK(-1 <= groups[row] && groups[row] < num_groups, "group must be in [-1, ", num_groups - 1, "], got ",
                    groups[row]);
    const int64_t sequence = groups[row] < 0 ? num_groups : groups[row];
    plan.queries.push_back({row, sequence, 0, groups[row] < 0 ? 0 : starts[sequence + 1] - starts[sequence]});
  }
  std::sort(plan.queries.begin(), plan.queries.end(), [](const Query& a, const Query& b) {
    return std::pair(a.sequence, a.token) < std::pair(b.sequence, b.token);
  });
  for (int64_t begin = 0, end; begin < num_rows; begin = end) {
    const int64_t sequence = plan.queries[begin].sequence;
    for (end = begin + 1; end < num_rows && plan.queries[end].sequence == sequence;) ++end;
    plan.units.push_back({begin, end, sequence, 0});
  }
  const Call call{dtype_of(query, "query"), strided_rows(query), strided_rows(key), strided_rows(value),
                  out.mutable_data_ptr(), lse.mutable_data_ptr<float>(), query.size(1), query.size(1) / key.size(1),
                  query.size(2), std::max<int64_t>(key.size(0), 1), static_cast<float>(softmax_scale)};
  run(call, plan);
}

}  // namespace
}  // namespace llava_cot

STABLE_TORCH_LIBRARY_IMPL(llava_cot_kernels, CPU, m) {
  m.impl("paged_attention", TORCH_BOX(&llava_cot::paged_attention));
  m.impl("shared_attention", TORCH_BOX(&llava_cot::shared_attention));
}
