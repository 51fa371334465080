// Sampling's passes over the vocabulary, 16 tokens at a time. Nothing here is fused or reordered: masses equal the
// reference bit by bit, and all results are the same on every instruction set.
#pragma once

#include "cpu/vec.h"

namespace llava_cot {
namespace {

ALWAYS_INLINE Vec weight_of(Vec x) { return exp_nonpositive<false>(x); }

// trunc(weight * 2^40) for a weight in [0, 1] as two numbers of 20 bits, of which a block's sums fit 32: high * 2^20 +
// low. Every step is exact.
struct Mass {
  Ints high, low;

  ALWAYS_INLINE explicit Mass(Vec weight) {
    const Vec scaled = weight * 0x1p20f;
    high = truncate(scaled);
    low = truncate((scaled - to_float(high)) * 0x1p20f);
  }

  ALWAYS_INLINE void add(const Mass& other) {
    high = high + other.high;
    low = low + other.low;
  }

  ALWAYS_INLINE void store_to(uint64_t* masses) const {
    int32_t highs[LANES], lows[LANES];
    store(high, highs);
    store(low, lows);
    for (int lane = 0; lane < LANES; ++lane) {
      masses[lane] = static_cast<uint64_t>(highs[lane]) << 20 | static_cast<uint64_t>(lows[lane]);
    }
  }

  ALWAYS_INLINE uint64_t total() const {
    int32_t highs[LANES], lows[LANES];
    store(high, highs);
    store(low, lows);
    uint64_t total = 0;
    for (int lane = 0; lane < LANES; ++lane) total += (static_cast<uint64_t>(highs[lane]) << 20) + lows[lane];
    return total;
  }
};

ALWAYS_INLINE Ints key_of(Vec x) { return bits_of(x) & 0x7fffffff; }  // 0 and -0 are one key

template <Dtype D>
ALWAYS_INLINE float largest_of(const void* logits, int64_t n) {
  Vec even = -INF, odd = -INF;
  Ints is_nan = 0;
  int64_t i = 0;
  for (; i + 2 * LANES <= n; i += 2 * LANES) {
    const Vec a = load<D>(logits, i), b = load<D>(logits, i + LANES);
    even = max(even, a);
    odd = max(odd, b);
    is_nan = is_nan | (a != a) | (b != b);
  }
  for (; i < n; i += LANES) {
    const Vec rest = load<D>(logits, i, n, -INF);
    even = max(even, rest);
    is_nan = is_nan | (rest != rest);
  }
  return lanes_of(is_nan) ? __builtin_nanf("") : max_of(max(even, odd));
}

float largest(Dtype dtype, const void* logits, int64_t n) {
  return with_dtype(dtype, [=]<Dtype D>() { return largest_of<D>(logits, n); });
}

// Returns the first token with that logit, which must exist.
int64_t find(Dtype dtype, const void* logits, int64_t n, float logit) {
  return with_dtype(dtype, [=]<Dtype D>() {
    int64_t i = 0;
    uint32_t found = 0;
    for (; i < n && !found; i += LANES) found = lanes_of(load<D>(logits, i, n, -INF) == Vec(logit));
    return i - LANES + __builtin_ctz(found);
  });
}

// Sums over d = logit - largest. Blocks are summed in float32 and added in double.
RowSums row_sums(Dtype dtype, const void* logits, int64_t n, float largest) {
  return with_dtype(dtype, [=]<Dtype D>() {
    RowSums sums{0.0, 0.0};
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
      Vec partition = 0.0f, weighted = 0.0f;
      for (int64_t i = begin; i < begin + BLOCK && i < n; i += LANES) {
        const Vec d = load<D>(logits, i, n, -INF) - largest;
        const Vec e = weight_of(d);
        partition = partition + e;
        weighted = weighted + e * max(d, -128.0f);  // e is 0 there; a masked token would add 0 * inf
      }
      sums.partition += sum_of(partition);
      sums.weighted += sum_of(weighted);
    }
    return sums;
  });
}

// x = (logit - largest) / temperature, weight = exp(x), and the masses of blocks; returns their sum.
uint64_t shape(Dtype dtype, const void* logits, int64_t n, float largest, float temperature, float* x, float* weight,
               uint64_t* block_masses) {
  return with_dtype(dtype, [=]<Dtype D>() {
    uint64_t total = 0;
    for (int64_t begin = 0; begin < n; begin += BLOCK) {
      Mass mass(0.0f);
      for (int64_t i = begin; i < begin + BLOCK && i < n; i += LANES) {
        const Vec tempered = (load<D>(logits, i, n, -INF) - largest) / temperature;
        const Vec w = weight_of(tempered);
        store(tempered, x + i);
        store(w, weight + i);
        mass.add(Mass(w));
      }
      total += block_masses[begin / BLOCK] = mass.total();
    }
    return total;
  });
}

ALWAYS_INLINE Vec kept_weight(Tokens tokens, int64_t i, Kept kept) {
  const Vec weight = load(tokens.weight + i);
  return select((key_of(load(tokens.x + i)) <= Ints(kept.limit)) & (weight >= Vec(kept.min_p)), weight, 0.0f);
}

// Computes the masses of blocks after the filters and returns their sum.
uint64_t keep(Tokens tokens, Kept kept, uint64_t* block_masses) {
  uint64_t total = 0;
  for (int64_t begin = 0; begin < tokens.count; begin += BLOCK) {
    Mass mass(0.0f);
    for (int64_t i = begin; i < begin + BLOCK && i < tokens.count; i += LANES) {
      mass.add(Mass(kept_weight(tokens, i, kept)));
    }
    total += block_masses[begin / BLOCK] = mass.total();
  }
  return total;
}

// Computes the mass of each token, including those that pad the last vector.
void masses(Tokens tokens, Kept kept, uint64_t* masses) {
  for (int64_t i = 0; i < tokens.count; i += LANES) Mass(kept_weight(tokens, i, kept)).store_to(masses + i);
}

// Adds each token with a key up to the limit, its mass or 1, to a copy of its bin: histogram[NUM_BINS][BIN_COPIES].
// It works on one block at a time. It first compacts those tokens, then computes vectors of bins and amounts, and then
// adds them, so no step waits for another.
template <bool BY_MASS>
ALWAYS_INLINE void add_to_histogram(Tokens tokens, int32_t limit, Bins bins, uint64_t* histogram) {
  float x[BLOCK + LANES], weight[BLOCK + LANES];
  int32_t first_copy[BLOCK];
  uint64_t amount[BLOCK];
  for (int64_t begin = 0; begin < tokens.count; begin += BLOCK) {
    int64_t count = 0;
    for (int64_t i = begin; i < begin + BLOCK && i < tokens.count; i += LANES) {
      const Vec v = load(tokens.x + i);
      const uint32_t lanes = lanes_of(key_of(v) <= Ints(limit));
      if constexpr (BY_MASS) store_lanes(load(tokens.weight + i), lanes, weight + count);
      count += store_lanes(v, lanes, x + count);
    }
    store(-INF, x + count);
    store(0.0f, weight + count);
    for (int64_t i = 0; i < count; i += LANES) {
      const Ints bin = max(min(shift_right(key_of(load(x + i)) - bins.base, bins.shift), NUM_BINS - 1), 0);
      store(shift_left(bin, BIN_COPY_BITS), first_copy + i);
      if constexpr (BY_MASS) {
        Mass(load(weight + i)).store_to(amount + i);
      } else {
        for (int64_t lane = i; lane < i + LANES; ++lane) amount[lane] = lane < count;
      }
    }
    for (int64_t i = 0; i < count; i += BIN_COPIES) {
      for (int copy = 0; copy < BIN_COPIES; ++copy) (histogram + copy)[first_copy[i + copy]] += amount[i + copy];
    }
  }
}

void histogram(Tokens tokens, int32_t limit, bool by_mass, Bins bins, uint64_t* histogram) {
  by_mass ? add_to_histogram<true>(tokens, limit, bins, histogram)
          : add_to_histogram<false>(tokens, limit, bins, histogram);
}

// Copies the tokens with keys in [first, last] to x and weight, which may be their source, and pads them with a vector
// of -inf.
Compacted compact(Tokens tokens, int32_t first, int32_t last, float* x, float* weight) {
  int64_t count = 0;
  for (int64_t i = 0; i < tokens.count; i += LANES) {
    const Vec v = load(tokens.x + i);
    const Ints key = key_of(v);
    const uint32_t inside = lanes_of((Ints(first) <= key) & (key <= Ints(last)));
    if (VECTOR_BYTES < 64 && !inside) continue;  // AVX-512 is faster without a branch
    store_lanes(load(tokens.weight + i), inside, weight + count);
    count += store_lanes(v, inside, x + count);
  }
  store(-INF, x + count);
  store(0.0f, weight + count);
  Ints smallest = 0x7fffffff, largest = -1;
  for (int64_t i = 0; i < count; i += LANES) {
    const Ints key = key_of(load<Dtype::FLOAT32>(x, i, count, x[0]));
    smallest = min(smallest, key);
    largest = max(largest, key);
  }
  int32_t low[LANES], high[LANES];
  store(smallest, low);
  store(largest, high);
  for (int lane = 1; lane < LANES; ++lane) {
    low[0] = low[lane] < low[0] ? low[lane] : low[0];
    high[0] = high[lane] > high[0] ? high[lane] : high[0];
  }
  return {{x, weight, count}, low[0], high[0]};
}

}  // namespace
}  // namespace llava_cot
