// The microkernel of attention: 16 query rows, one per vector lane, against a block of up to 64 keys.
#pragma once

#include "cpu/vec.h"

#include <algorithm>
#include <cstdint>
#include <limits>

namespace llava_cot {
namespace {

constexpr int LANES = 16;
constexpr int UNROLL = 8;  // independent sums per vector: what hides the latency of a multiply-add
constexpr int KEY_BLOCK = 64;
constexpr float INF = std::numeric_limits<float>::infinity();

constexpr int64_t round_up(int64_t size, int64_t multiple) { return (size + multiple - 1) / multiple * multiple; }

struct alignas(64) Lanes {
  float of[LANES];
};

struct KeyBlock {
  int64_t first, count;            // keys [first, first + count) of the sequence
  const float* keys[KEY_BLOCK];    // [head_dim] each; the last one repeats up to a multiple of UNROLL
  const float* values[KEY_BLOCK];  // [head_dim rounded up to UNROLL] each
};

// 16 query rows and their softmax so far. A lane without a row sees no key.
struct Slab {
  Lanes* query;     // [head_dim], times softmax_scale
  Lanes* weighted;  // [head_dim rounded up to UNROLL], sum of exp(score - max) * value
  Lanes max, sum;
  int64_t limit[LANES];  // the row sees the keys [0, limit)
};

template <int BYTES>
struct Vector {
  typedef float type __attribute__((vector_size(BYTES), may_alias));
};

// scores[j] = query . keys[j]
template <int BYTES>
ALWAYS_INLINE void score_block(const KeyBlock& block, int64_t head_dim, const Lanes* query, Lanes* scores) {
  using Vec = typename Vector<BYTES>::type;
  for (int64_t j = 0; j < block.count; j += UNROLL) {
    const float* const* keys = block.keys + j;
    for (int lane = 0; lane < LANES; lane += BYTES / sizeof(float)) {
      Vec sums[UNROLL] = {};
      for (int64_t d = 0; d < head_dim; ++d) {
        const Vec q = *reinterpret_cast<const Vec*>(query[d].of + lane);
        for (int i = 0; i < UNROLL; ++i) sums[i] += q * keys[i][d];
      }
      for (int i = 0; i < UNROLL; ++i) *reinterpret_cast<Vec*>(scores[j + i].of + lane) = sums[i];
    }
  }
}

// weighted = weighted * correction + sum over j of weights[j] * values[j]
template <int BYTES>
ALWAYS_INLINE void weigh_block(const KeyBlock& block, int64_t head_dim, const Lanes* weights, const Lanes& correction,
                               Lanes* weighted) {
  using Vec = typename Vector<BYTES>::type;
  for (int64_t d = 0; d < head_dim; d += UNROLL) {
    for (int lane = 0; lane < LANES; lane += BYTES / sizeof(float)) {
      Vec sums[UNROLL] = {};
      for (int64_t j = 0; j < block.count; ++j) {
        const Vec weight = *reinterpret_cast<const Vec*>(weights[j].of + lane);
        for (int i = 0; i < UNROLL; ++i) sums[i] += weight * block.values[j][d + i];
      }
      const Vec scale = *reinterpret_cast<const Vec*>(correction.of + lane);
      for (int i = 0; i < UNROLL; ++i) {
        Vec& total = *reinterpret_cast<Vec*>(weighted[d + i].of + lane);
        total = total * scale + sums[i];
      }
    }
  }
}

// Turns scores into exp(score - max), adds them to the sum, and returns by how much earlier terms shrink.
ALWAYS_INLINE Lanes softmax_block(const KeyBlock& block, Slab& slab, Lanes* scores) {
  int32_t visible[LANES];
  Lanes max = slab.max, shift, correction, sum = {};
  for (int lane = 0; lane < LANES; ++lane) {
    visible[lane] = static_cast<int32_t>(std::clamp<int64_t>(slab.limit[lane] - block.first, 0, block.count));
  }
  for (int j = 0; j < block.count; ++j) {
#pragma omp simd
    for (int lane = 0; lane < LANES; ++lane) {
      const float score = j < visible[lane] ? scores[j].of[lane] : -INF;
      scores[j].of[lane] = score;
      max.of[lane] = score > max.of[lane] ? score : max.of[lane];
    }
  }
#pragma omp simd
  for (int lane = 0; lane < LANES; ++lane) {
    shift.of[lane] = max.of[lane] == -INF ? 0.0f : max.of[lane];  // without a key yet, -inf - -inf would be NaN
    correction.of[lane] = exp_nonpositive(slab.max.of[lane] - shift.of[lane]);
  }
  for (int j = 0; j < block.count; ++j) {
#pragma omp simd
    for (int lane = 0; lane < LANES; ++lane) {
      const float weight = exp_nonpositive(scores[j].of[lane] - shift.of[lane]);
      scores[j].of[lane] = weight;
      sum.of[lane] += weight;
    }
  }
  slab.max = max;
  for (int lane = 0; lane < LANES; ++lane) {
    slab.sum.of[lane] = slab.sum.of[lane] * correction.of[lane] + sum.of[lane];
  }
  return correction;
}

template <int BYTES>
ALWAYS_INLINE void attend_block_with(const KeyBlock& block, int64_t head_dim, Slab& slab) {
  Lanes weights[KEY_BLOCK];
  score_block<BYTES>(block, head_dim, slab.query, weights);
  const Lanes correction = softmax_block(block, slab, weights);
  weigh_block<BYTES>(block, head_dim, weights, correction, slab.weighted);
}

// Written out instead of MULTIVERSION: each instruction set wants the vectors that just fit its registers.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
__attribute__((target("arch=x86-64-v4"))) void attend_block(const KeyBlock& block, int64_t head_dim, Slab& slab) {
  attend_block_with<64>(block, head_dim, slab);
}
__attribute__((target("arch=x86-64-v3"))) void attend_block(const KeyBlock& block, int64_t head_dim, Slab& slab) {
  attend_block_with<32>(block, head_dim, slab);
}
__attribute__((target("default")))
#endif
void attend_block(const KeyBlock& block, int64_t head_dim, Slab& slab) {
  attend_block_with<16>(block, head_dim, slab);
}

}  // namespace
}  // namespace llava_cot
