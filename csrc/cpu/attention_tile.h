// The work of a tile of query rows: from the plan (which rows read which keys) through blocks of keys to rows of `out`.
#pragma once

#include "cpu/dtype.h"
#include "cpu/isa.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace llava_cot {
namespace {

constexpr float INF = std::numeric_limits<float>::infinity();

// [tokens, heads, head_dim] with a dense last dimension.
struct Rows {
  const char* data;
  int64_t token_stride, head_stride;  // bytes

  const char* at(int64_t token, int64_t head) const { return data + token * token_stride + head * head_stride; }
};

// Key t of a sequence is token first + pages[t / page_size] * page_size + t % page_size of the cache. Packed keys are
// one page that starts at `first`.
struct Keys {
  const int32_t* pages;
  int64_t first;
};

struct Call {
  Dtype dtype;
  Rows query, key, value;
  void* out;   // [tokens, num_heads, head_dim]
  float* lse;  // [tokens, num_heads]
  int64_t num_heads, heads_per_kv, head_dim, page_size;
  float softmax_scale;
};

struct Query {
  int64_t token, sequence, first, limit;  // the query sees the keys [first, limit) of its sequence
};

// Stacked queries of one sequence, or of several that share the keys [0, shared).
struct Unit {
  int64_t begin, end;  // indices into Plan::queries
  int64_t leader, shared;
};

struct Tile {
  const Unit* unit;
  int64_t first_row, end_row;  // row r of a unit is its query r / heads_per_kv, head r % heads_per_kv of the kv head
};

// Which rows read which keys. Tiles point into units, so all units must exist before tiles are cut.
struct Plan {
  std::vector<Keys> sequences;
  std::vector<Query> queries;
  std::vector<Unit> units;
  std::vector<Tile> tiles;
  std::vector<int64_t> order;  // the sequences, sorted by group

  void clear() {
    sequences.clear();
    queries.clear();
    units.clear();
    tiles.clear();
  }

  void cut(int64_t heads_per_kv, int64_t rows_per_tile) {
    tiles.clear();
    for (const Unit& unit : units) {
      const int64_t num_rows = (unit.end - unit.begin) * heads_per_kv;
      for (int64_t row = 0; row < num_rows; row += rows_per_tile) {
        tiles.push_back({&unit, row, std::min(row + rows_per_tile, num_rows)});
      }
    }
  }
};

// The rows of a tile. Lanes beyond num_rows compute too, on arbitrary data, and are never read.
struct Stack {
  int64_t num_rows;
  std::vector<Lanes> memory;
  Slab slabs[MAX_SLABS];
  const Query* queries[MAX_SLABS * LANES];
  int64_t heads[MAX_SLABS * LANES];

  void clear(int64_t head_dim) {
    num_rows = 0;
    const int64_t padded_dim = round_up(head_dim, UNROLL);
    memory.resize(MAX_SLABS * 2 * padded_dim);
    for (int i = 0; i < MAX_SLABS; ++i) {
      Slab& slab = slabs[i];
      slab.query = memory.data() + i * 2 * padded_dim;
      slab.weighted = slab.query + padded_dim;
      for (int lane = 0; lane < LANES; ++lane) {
        slab.max.of[lane] = -INF;
        slab.sum.of[lane] = 0;
        slab.first[lane] = std::numeric_limits<int64_t>::max();
        slab.limit[lane] = 0;
      }
    }
  }

  int64_t num_slabs() const { return (num_rows + LANES - 1) / LANES; }

  void push(const Query& query, int64_t head) {
    Slab& slab = slabs[num_rows / LANES];
    slab.first[num_rows % LANES] = query.first;
    slab.limit[num_rows % LANES] = query.limit;
    queries[num_rows] = &query;
    heads[num_rows++] = head;
  }
};

struct Scratch {
  Stack stacked, own;
  std::vector<float> block, row;
};

void load_rows(const Call& call, const Plan& plan, const Tile& tile, int64_t kv_head, Scratch& scratch) {
  Stack& stack = scratch.stacked;
  stack.clear(call.head_dim);
  scratch.row.resize(call.head_dim);
  scratch.block.resize(KeyBlock::scratch_size(call.head_dim));
  for (int64_t row = tile.first_row; row < tile.end_row; ++row) {
    const Query& query = plan.queries[tile.unit->begin + row / call.heads_per_kv];
    const int64_t head = kv_head * call.heads_per_kv + row % call.heads_per_kv;
    const Slab& slab = stack.slabs[stack.num_rows / LANES];
    const int64_t lane = stack.num_rows % LANES;
    loops().widen(call.dtype, call.query.at(query.token, head), call.head_dim, scratch.row.data());
    for (int64_t d = 0; d < call.head_dim; ++d) {
      slab.query[d].of[lane] = scratch.row[d] * call.softmax_scale;
      slab.weighted[d].of[lane] = 0;
    }
    stack.push(query, head);
  }
}

// Moves the rows [begin, end), with their softmax so far, into a stack of their own.
void take_rows(const Stack& from, int64_t begin, int64_t end, int64_t head_dim, Stack& to) {
  to.clear(head_dim);
  while (begin < end) {
    const Slab& source = from.slabs[begin / LANES];
    Slab& target = to.slabs[to.num_rows / LANES];
    const int64_t first = begin % LANES, lane = to.num_rows % LANES;
    const int64_t count = std::min({end - begin, LANES - first, LANES - lane});  // lanes side by side in both
    std::copy_n(source.max.of + first, count, target.max.of + lane);
    std::copy_n(source.sum.of + first, count, target.sum.of + lane);
    for (int64_t d = 0; d < head_dim; ++d) {
      for (int64_t i = 0; i < count; ++i) {
        target.query[d].of[lane + i] = source.query[d].of[first + i];
        target.weighted[d].of[lane + i] = source.weighted[d].of[first + i];
      }
    }
    for (int64_t i = 0; i < count; ++i, ++begin) to.push(*from.queries[begin], from.heads[begin]);
  }
}

void find_block(const Call& call, const Keys& keys, int64_t kv_head, int64_t first, int64_t count, KeyBlock& block) {
  block.first = first;
  block.count = count;
  const int32_t* page = keys.pages + first / call.page_size;
  int64_t offset = first % call.page_size;
  for (int64_t j = 0; j < count; ++j) {
    const int64_t token = keys.first + *page * call.page_size + offset;
    block.keys[j] = call.key.at(token, kv_head);
    block.values[j] = call.value.at(token, kv_head);
    if (++offset == call.page_size) {
      offset = 0;
      ++page;
    }
  }
}

// All rows of the stack read the keys [first, end), as far as each sees them. What no row sees is not read, but for keys
// between the windows of two rows in one block.
void attend(const Call& call, const Keys& keys, int64_t kv_head, int64_t first, int64_t end, Stack& stack,
            Scratch& scratch) {
  int64_t lowest = end, last = 0;
  for (int64_t row = 0; row < stack.num_rows; ++row) {
    lowest = std::min(lowest, stack.queries[row]->first);
    last = std::max(last, stack.queries[row]->limit);
  }
  end = std::min(end, last);
  KeyBlock block;
  block.dtype = call.dtype;
  block.head_dim = call.head_dim;
  block.scratch = scratch.block.data();
  int64_t next;
  for (first = std::max(first, lowest); first < end; first = next) {
    next = std::min(end, first / KEY_BLOCK * KEY_BLOCK + KEY_BLOCK);
    Slab* seeing[MAX_SLABS];
    int64_t num_seeing = 0, seen_first = next, seen_end = first;
    for (int64_t i = 0; i < stack.num_slabs(); ++i) {
      Slab& slab = stack.slabs[i];
      bool sees = false;
      for (int lane = 0; lane < LANES; ++lane) {
        if (slab.first[lane] >= next || slab.limit[lane] <= first) continue;
        sees = true;
        seen_first = std::min(seen_first, slab.first[lane]);
        seen_end = std::max(seen_end, slab.limit[lane]);
      }
      if (sees) seeing[num_seeing++] = &slab;
    }
    if (!num_seeing) continue;
    seen_first = std::max(first, seen_first);
    find_block(call, keys, kv_head, seen_first, std::min(next, seen_end) - seen_first, block);
    loops().attend_block(block, seeing, num_seeing);
  }
}

void store_rows(const Call& call, const Stack& stack, std::vector<float>& out) {
  out.resize(call.head_dim);
  for (int64_t row = 0; row < stack.num_rows; ++row) {
    const Slab& slab = stack.slabs[row / LANES];
    const int64_t lane = row % LANES;
    const float sum = slab.sum.of[lane];
    const int64_t result = stack.queries[row]->token * call.num_heads + stack.heads[row];
    for (int64_t d = 0; d < call.head_dim; ++d) out[d] = sum == 0.0f ? 0.0f : slab.weighted[d].of[lane] / sum;
    narrow(call.dtype, out.data(), call.head_dim, call.out, result * call.head_dim);
    call.lse[result] = slab.max.of[lane] + std::log(sum);  // -inf for a row without keys
  }
}

void run_tile(const Call& call, const Plan& plan, const Tile& tile, int64_t kv_head, Scratch& scratch) {
  Stack& stacked = scratch.stacked;
  const Unit& unit = *tile.unit;
  load_rows(call, plan, tile, kv_head, scratch);
  attend(call, plan.sequences[unit.leader], kv_head, 0, unit.shared, stacked, scratch);
  for (int64_t begin = 0, end; begin < stacked.num_rows; begin = end) {
    const int64_t sequence = stacked.queries[begin]->sequence;
    for (end = begin + 1; end < stacked.num_rows && stacked.queries[end]->sequence == sequence;) ++end;
    const bool alone = end - begin == stacked.num_rows;
    if (!alone) take_rows(stacked, begin, end, call.head_dim, scratch.own);
    Stack& stack = alone ? stacked : scratch.own;
    attend(call, plan.sequences[sequence], kv_head, unit.shared, std::numeric_limits<int64_t>::max(), stack, scratch);
    store_rows(call, stack, scratch.row);
  }
}

}  // namespace
}  // namespace llava_cot
