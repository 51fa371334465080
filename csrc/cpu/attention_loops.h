// The microkernel of attention: up to 64 query rows, 16 to a slab and one per vector lane, against up to 64 keys.
#pragma once

#include "cpu/vec.h"

namespace llava_cot {
namespace {

// A register tile: N vectors of query rows by some keys (or dimensions of values). Each broadcast number feeds N
// multiply-adds, and the registers hold as many sums as possible. Grouping rows changes no row's sums. The function is
// not inlined, because the loop needs every register and a caller would keep some.
#define NO_INLINE __attribute__((noinline))
template <int N>
constexpr int COLS = VECTOR_BYTES < 64 || N == 4 ? 4 : 8;
static_assert(UNROLL % 8 == 0);

typedef FloatPart LanesPart __attribute__((may_alias));

template <int N>
struct Size {};

// Vector `first` and the following ones in the Lanes arrays of several slabs. Element d of one is at [d * PARTS].
template <int N>
struct Vectors {
  LanesPart* of[N];

  ALWAYS_INLINE Vectors(Lanes* const* arrays, int64_t first) {
    for (int i = 0; i < N; ++i) {
      of[i] = reinterpret_cast<LanesPart*>(arrays[(first + i) / PARTS]) + (first + i) % PARTS;
    }
  }
};

// Prefetches the next UNROLL keys and the next UNROLL values, each of which lies a token apart from the last.
struct Ahead {
  const char* rows[2 * UNROLL];
  int64_t item_size;
};

// scores[k] = query . keys[k] for UNROLL keys.
template <int N>
NO_INLINE void score_keys(const float* const* all_keys, int64_t head_dim, Vectors<N> queries, Vectors<N> scores,
                          const Ahead* ahead) {
  for (int64_t j = 0; j < UNROLL; j += COLS<N>) {
    const float* const* keys = all_keys + j;
    FloatPart sums[N][COLS<N>] = {};
    for (int64_t begin = 0; begin < head_dim; begin += LANES) {
      if (ahead && j == 0) {
        for (const char* row : ahead->rows) __builtin_prefetch(row + begin * ahead->item_size, 0, 2);
      }
      const int64_t end = begin + LANES < head_dim ? begin + LANES : head_dim;
      for (int64_t d = begin; d < end; ++d) {
        for (int k = 0; k < COLS<N>; ++k) {
          const FloatPart key = broadcast(keys[k][d]);
          for (int i = 0; i < N; ++i) sums[i][k] = multiply_add(queries.of[i][d * PARTS], key, sums[i][k]);
        }
      }
    }
    for (int i = 0; i < N; ++i) {
      for (int k = 0; k < COLS<N>; ++k) scores.of[i][(j + k) * PARTS] = sums[i][k];
    }
  }
}

// weighted = weighted * correction + sum over j of weights[j] * values[j]
template <int N>
NO_INLINE void weigh_values(const float* const* values, int64_t count, int64_t head_dim, Vectors<N> weights,
                            Vectors<N> corrections, Vectors<N> weighted) {
  for (int64_t d = 0; d < head_dim; d += COLS<N>) {
    FloatPart sums[N][COLS<N>] = {};
    for (int64_t j = 0; j < count; ++j) {
      const float* value = values[j] + d;
      for (int k = 0; k < COLS<N>; ++k) {
        const FloatPart column = broadcast(value[k]);
        for (int i = 0; i < N; ++i) sums[i][k] = multiply_add(weights.of[i][j * PARTS], column, sums[i][k]);
      }
    }
    for (int i = 0; i < N; ++i) {
      for (int k = 0; k < COLS<N>; ++k) {
        LanesPart& total = weighted.of[i][(d + k) * PARTS];
        total = multiply_add(total, *corrections.of[i], sums[i][k]);
      }
    }
  }
}

// Turns scores into exp(score - max), adds them to the sum, and returns by how much earlier terms shrink.
ALWAYS_INLINE Vec softmax_block(const KeyBlock& block, Slab& slab, Lanes* scores) {
  int32_t visible[LANES], hidden[LANES], most_hidden = 0;
  for (int lane = 0; lane < LANES; ++lane) {
    const int64_t seen = slab.limit[lane] - block.first, unseen = slab.first[lane] - block.first;
    visible[lane] = static_cast<int32_t>(seen < 0 ? 0 : seen < block.count ? seen : block.count);
    hidden[lane] = static_cast<int32_t>(unseen < 0 ? 0 : unseen < block.count ? unseen : block.count);
    most_hidden = most_hidden < hidden[lane] ? hidden[lane] : most_hidden;
  }
  const Ints begin = load(hidden);
  for (int j = 0; j < most_hidden; ++j) store(select(Ints(j) < begin, -INF, load(scores[j].of)), scores[j].of);
  const Ints end = load(visible);
  const Vec before = load(slab.max.of);
  Vec largest = before, sum = 0.0f;
  for (int j = 0; j < block.count; ++j) {
    const Vec score = select(Ints(j) < end, load(scores[j].of), -INF);
    store(score, scores[j].of);
    largest = max(largest, score);
  }
  const Vec shift = select(largest == Vec(-INF), 0.0f, largest);  // without a key yet, -inf - -inf would be NaN
  const Vec correction = exp_nonpositive<true>(before - shift);
  for (int j = 0; j < block.count; ++j) {
    const Vec weight = exp_nonpositive<true>(load(scores[j].of) - shift);
    store(weight, scores[j].of);
    sum = sum + weight;
  }
  store(largest, slab.max.of);
  store(multiply_add(load(slab.sum.of), correction, sum), slab.sum.of);
  return correction;
}

// visit(integral constant N, first) for groups of N vectors that cover the slabs.
template <int MAX_VECTORS, class Visitor>
ALWAYS_INLINE void for_groups(int64_t num_slabs, const Visitor& visit) {
  const int64_t vectors = num_slabs * PARTS;
  int64_t v = 0;
  for (; v + MAX_VECTORS <= vectors; v += MAX_VECTORS) visit(Size<MAX_VECTORS>{}, v);
  for (; v + 2 <= vectors; v += 2) visit(Size<2>{}, v);
  if (v < vectors) visit(Size<1>{}, v);
}

// Rows of float32: where they lie, or packed into scratch.
void float_rows(const KeyBlock& block, const char* const* rows, bool pack, float* scratch, const float** out) {
  const int64_t stride = KeyBlock::row_stride(block.head_dim);
  for (int64_t j = 0; j < block.count; ++j) {
    out[j] = pack ? scratch + j * stride : reinterpret_cast<const float*>(rows[j]);
    if (pack) widen(block.dtype, rows[j], block.head_dim, scratch + j * stride);
  }
  for (int64_t j = block.count; j < round_up(block.count, UNROLL); ++j) out[j] = out[block.count - 1];
}

// Keys are read once or twice, in place unless they must be widened. Values are read again for each few dimensions, and
// those of one kv head lie a token apart, often a multiple of 4 KiB, where they would evict each other from the cache:
// they are packed unless one slab alone reads them. So are those that UNROLL would overrun.
void attend_block(const KeyBlock& block, Slab* const* slabs, int64_t num_slabs) {
  Lanes memory[MAX_SLABS][KEY_BLOCK], corrections[MAX_SLABS];
  Lanes *queries[MAX_SLABS] = {}, *scores[MAX_SLABS] = {}, *correction[MAX_SLABS] = {}, *weighted[MAX_SLABS] = {};
  const float* rows[KEY_BLOCK];
  for (int64_t i = 0; i < num_slabs; ++i) {
    queries[i] = slabs[i]->query;
    correction[i] = &corrections[i];
    weighted[i] = slabs[i]->weighted;
  }
  const bool is_float32 = block.dtype == Dtype::FLOAT32;
  float* scratch = block.scratch;
  float_rows(block, block.keys, !is_float32, scratch, rows);
  for (int64_t j = 0; j < block.count; j += UNROLL) {
    Ahead ahead{{}, is_float32 ? 4 : 2};
    for (int64_t k = 0; k < UNROLL; ++k) {
      const int64_t last = block.count - 1, next = j + UNROLL + k, now = j + k;
      ahead.rows[k] = block.keys[next < last ? next : last];
      ahead.rows[UNROLL + k] = block.values[now < last ? now : last];
    }
    for (int64_t i = 0; i < num_slabs; ++i) scores[i] = memory[i] + j;
    for_groups<2>(num_slabs, [&]<int N>(Size<N>, int64_t v) __attribute__((always_inline)) {
      score_keys<N>(rows + j, block.head_dim, {queries, v}, {scores, v}, v == 0 ? &ahead : nullptr);
    });
  }
  for (int64_t i = 0; i < num_slabs; ++i) {
    scores[i] = memory[i];
    store(softmax_block(block, *slabs[i], scores[i]), correction[i]->of);
  }
  const bool pack = !is_float32 || num_slabs > 1 || block.head_dim % UNROLL != 0;
  float_rows(block, block.values, pack, scratch, rows);
  for_groups<VECTOR_BYTES == 64 ? 4 : 2>(num_slabs, [&]<int N>(Size<N>, int64_t v) __attribute__((always_inline)) {
    weigh_values<N>(rows, block.count, block.head_dim, {scores, v}, {correction, v}, {weighted, v});
  });
}

}  // namespace
}  // namespace llava_cot
