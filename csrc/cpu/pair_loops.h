// Products of bfloat16 with float32 sums, which ATen's matrix product would round to bfloat16, and their use in
// linear_logprobs. They are for AVX-512 with bfloat16 products, the only instruction set that gains from them.
#pragma once

#include "cpu/linear_loops.h"
#include "cpu/logprob_loops.h"

namespace llava_cot {
namespace {

static_assert(VECTOR_BYTES == 64);

template <int VECTORS>
ALWAYS_INLINE void finish_row(const PairProduct& p, int64_t row, int64_t num_columns, const __m512* sum) {
  for (int v = 0; v < VECTORS; ++v) {
    const int64_t left = num_columns - v * LANES;
    const __mmask16 inside = left >= LANES ? 0xffff : static_cast<__mmask16>((1u << left) - 1);
    const int64_t at = row * p.out_stride + v * LANES;
    if (p.how == Sum::STORE_BFLOAT16) {
      const __m256i rounded = (__m256i)_mm512_cvtneps_pbh(sum[v]);
      _mm256_mask_storeu_epi16(static_cast<uint16_t*>(p.out) + at, inside, rounded);
      continue;
    }
    float* out = static_cast<float*>(p.out) + at;
    const __m512 before = p.how == Sum::ADD ? _mm512_maskz_loadu_ps(inside, out) : _mm512_setzero_ps();
    _mm512_mask_storeu_ps(out, inside, before + sum[v]);
  }
}

// PRODUCT_ROWS rows with VECTORS x 16 columns: 24 sums stay in registers, beside the panel's vectors and a broadcast.
template <int VECTORS>
ALWAYS_INLINE void multiply_columns(const PairProduct& p) {
  for (int64_t row = 0; row < p.num_rows; row += PRODUCT_ROWS) {
    const char* left[PRODUCT_ROWS];
    for (int64_t i = 0; i < PRODUCT_ROWS; ++i) {  // past the last row, repeat the last row
      left[i] = p.left + (row + i < p.num_rows ? row + i : p.num_rows - 1) * p.row_stride;
    }
    __m512 sum[PRODUCT_ROWS][VECTORS];
    for (int i = 0; i < PRODUCT_ROWS; ++i) {
      for (int v = 0; v < VECTORS; ++v) sum[i][v] = _mm512_setzero_ps();
    }
    const uint32_t* right = p.panel;
    for (int64_t k = 0, at = 0; k < p.num_pairs; ++k, at += p.pair_stride, right += PANEL) {
      __m512bh columns[VECTORS];
      for (int v = 0; v < VECTORS; ++v) columns[v] = (__m512bh)_mm512_loadu_si512(right + v * LANES);
      for (int i = 0; i < PRODUCT_ROWS; ++i) {
        int32_t pair;
        __builtin_memcpy(&pair, left[i] + at, sizeof(pair));
        const __m512bh broadcast = (__m512bh)_mm512_set1_epi32(pair);
        for (int v = 0; v < VECTORS; ++v) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], columns[v], broadcast);
      }
    }
    for (int64_t i = 0; i < PRODUCT_ROWS && row + i < p.num_rows; ++i) {
      finish_row<VECTORS>(p, row + i, p.num_columns, sum[i]);
    }
  }
}

void multiply(const PairProduct& p) {
  switch ((p.num_columns + LANES - 1) / LANES) {
    case 1: return multiply_columns<1>(p);
    case 2: return multiply_columns<2>(p);
    case 3: return multiply_columns<3>(p);
    case 4: return multiply_columns<4>(p);
  }
}

ALWAYS_INLINE Ints pair_of(Ints low, Ints high) { return low | shift_left(high, 16); }

ALWAYS_INLINE Ints round_to_bfloat16(Vec x) {
  Ints halves;
  halves.part[0] = __builtin_convertvector((HalfPart)_mm512_cvtneps_pbh((__m512)x.part[0]), IntPart);
  return halves;
}

ALWAYS_INLINE void store_halves(Ints x, uint16_t* out) {
  *reinterpret_cast<AnyHalfPart*>(out) = __builtin_convertvector(x.part[0], HalfPart);
}

void interleave(const uint16_t* low, const uint16_t* high, int64_t n, uint32_t* out) {
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) {
    store(pair_of(load_halves(low + i), load_halves(high + i)), reinterpret_cast<int32_t*>(out + i));
  }
  for (; i < n; ++i) out[i] = low[i] | static_cast<uint32_t>(high[i]) << 16;
}

void reduce(const LogitColumns& logits, Piece* pieces) {
  Vec largest = -INF;
  for (int64_t t = 0; t < logits.num_tokens; ++t) largest = max(largest, load(logits.x + t * logits.stride));
  const Vec shift = select(largest == Vec(-INF), 0.0f, largest);
  Sums sums{0.0f, 0.0f};
  for (int64_t t = 0; t < logits.num_tokens; ++t) {
    sums.add((load(logits.x + t * logits.stride) - shift) * logits.scale);
  }
  float of_lane[3][LANES];
  store(largest, of_lane[0]);
  store(sums.sum, of_lane[1]);
  store(sums.weighted, of_lane[2]);
  for (int lane = 0; lane < LANES; ++lane) pieces[lane] = {of_lane[0][lane], of_lane[1][lane], of_lane[2][lane]};
}

// This one includes the onehot.
void to_gradient(const LogitColumns& logits, const ColumnGradient& of, uint16_t* by_row, uint32_t* by_pair) {
  const Vec lse = load(of.lse), entropy = load(of.entropy);
  const Vec grad_logprob = load(of.grad_logprob), grad_entropy = load(of.grad_entropy);
  const Ints target = load(of.target);
  const auto gradient = [&](int64_t t) __attribute__((always_inline)) {
    const Vec x = load(logits.x + t * logits.stride);
    const Vec others = gradient_of(x, logits.scale, lse, entropy, grad_logprob, grad_entropy);
    const Ints t_all = static_cast<int32_t>(t);
    const Ints is_target = (target <= t_all) & (t_all <= target);
    const Vec all = others + select(is_target, grad_logprob * logits.scale, 0.0f);
    return round_to_bfloat16(all);
  };
  for (int64_t t = 0; t < logits.num_tokens; t += 2) {
    const bool is_pair = t + 1 < logits.num_tokens;
    const Ints low = gradient(t), high = is_pair ? gradient(t + 1) : Ints(0);
    store_halves(low, by_row + t * logits.stride);
    if (is_pair) store_halves(high, by_row + (t + 1) * logits.stride);
    store(pair_of(low, high), reinterpret_cast<int32_t*>(by_pair + t / 2 * logits.stride));
  }
}

struct FewPairs {
  static constexpr int64_t STEP = 2 * LANES, ITEM = 2, X_ITEM = 2;

  static ALWAYS_INLINE __m512bh weight(const char* at) { return (__m512bh)_mm512_loadu_si512(at); }
  static ALWAYS_INLINE __m512bh x(const char* at) { return (__m512bh)_mm512_loadu_si512(at); }
  static ALWAYS_INLINE Vec add(__m512bh weight, __m512bh x, Vec sum) {
    sum.part[0] = (FloatPart)_mm512_dpbf16_ps((__m512)sum.part[0], weight, x);
    return sum;
  }
};

constexpr PairLoops PAIR_LOOPS{multiply, interleave, reduce, to_gradient, multiply_all<FewPairs>};

}  // namespace
}  // namespace llava_cot
