// The running softmax of a piece of the vocabulary, and the gradient of logits.
#pragma once

#include "cpu/vec.h"

namespace llava_cot {
namespace {

ALWAYS_INLINE Vec load_floats(const float* x, int64_t i, int64_t n, float fill) {
  return load<Dtype::FLOAT32>(x, i, n, fill);
}

// Sums over the distances d <= 0 of logits from the largest: of exp(d), and of exp(d) * d.
struct Sums {
  Vec sum, weighted;

  ALWAYS_INLINE void add(Vec d) {
    const Vec e = exp_nonpositive<true>(d);
    sum = sum + e;
    weighted = multiply_add(e, max(d, -88.0f), weighted);  // 0 * -88 for a masked token, where 0 * -inf would be NaN
  }
};

// Returns the gradient of x, for logits z = scale * x: d logprob / dz = onehot - p and d entropy / dz = -p (log p + H).
// The onehot is left out, since it concerns one token only.
ALWAYS_INLINE Vec gradient_of(Vec x, float scale, Vec lse, Vec entropy, Vec grad_logprob, Vec grad_entropy) {
  const Vec logp = multiply_add(x, scale, Vec(0.0f) - lse);
  const Vec bounded = max(logp, -88.0f) + entropy;  // p is 0 there: 0 * -88, not 0 * -inf
  return exp_nonpositive<true>(logp) * -scale * multiply_add(bounded, grad_entropy, grad_logprob);
}

Piece reduce_piece(const float* x, int64_t n, float scale) {
  Vec even = -INF, odd = -INF;
  for (int64_t i = 0; i < n; i += 2 * LANES) {
    even = max(even, load_floats(x, i, n, -INF));
    if (i + LANES < n) odd = max(odd, load_floats(x, i + LANES, n, -INF));
  }
  const float largest = max_of(max(even, odd));
  const Vec shift = largest == -INF ? 0.0f : largest;
  Sums sums{0.0f, 0.0f};
  for (int64_t i = 0; i < n; i += LANES) sums.add((load_floats(x, i, n, -INF) - shift) * scale);
  return {largest, sum_of(sums.sum), sum_of(sums.weighted)};
}

void logits_to_gradient(float* x, int64_t n, RowGradient row) {
  const auto gradient = [=](Vec v) __attribute__((always_inline)) {
    return gradient_of(v, row.scale, row.lse, row.entropy, row.grad_logprob, row.grad_entropy);
  };
  int64_t i = 0;
  for (; i + LANES <= n; i += LANES) store(gradient(load(x + i)), x + i);
  if (i == n) return;
  float rest[LANES];
  store(gradient(load_floats(x, i, n, 0.0f)), rest);
  __builtin_memcpy(x + i, rest, (n - i) * sizeof(float));
}

}  // namespace
}  // namespace llava_cot
