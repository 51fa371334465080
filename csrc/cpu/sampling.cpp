// Seeded sampling; llava_cot_kernels/sampling.py has the definition. A candidate takes three steps:
//   load   its row: d = l - max(l), and the raw distribution's partition function and entropy
//   shape  x = d / temperature, weight = exp(x), 0 where a filter drops it, and integer masses of blocks
//   draw   Philox, then the inverse CDF: first over blocks, then inside one
// The candidates of a fork stand next to each other and share load and shape, so that a fork costs one pass.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "checks.h"
#include "stage_tags.h"

// A fused multiply-add rounds once where the reference rounds twice. Without any, masses are equal bit by bit on every
// machine and on every device, and so are the tokens.
#if defined(__clang__)
#pragma STDC FP_CONTRACT OFF
#else
#pragma GCC optimize("fp-contract=off")
#endif
#include "cpu/vec.h"

namespace llava_cot {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kBlock = 256;  // tokens: float32 sums and integer masses are kept for so many at a time
constexpr uint32_t kNoLimit = std::numeric_limits<uint32_t>::max();
constexpr float kInfinity = std::numeric_limits<float>::infinity();

// ---- passes over the vocabulary ----

// trunc(weight * 2^40) for a weight in [0, 1], by shifts: AVX2 has no conversion from float to a 64-bit integer.
ALWAYS_INLINE uint64_t mass_of(float weight) {
  const uint32_t bits = std::bit_cast<uint32_t>(weight);
  const uint32_t shift = std::min(127 - (bits >> 23), 63u);
  return (static_cast<uint64_t>((bits & 0x7fffff) | 0x800000) << 17) >> shift;
}

// Ascends as x <= 0 descends; 0 and -0 are one key.
ALWAYS_INLINE uint32_t key_of(float x) { return std::bit_cast<uint32_t>(x) & 0x7fffffff; }

// Copies a row as float32 and returns its largest value, NaN if it holds any.
template <class T>
ALWAYS_INLINE float widen_row(const T* logits, float* out, int64_t n) {
  float largest = -kInfinity;
  int32_t has_nan = 0;
#pragma omp simd reduction(max : largest) reduction(| : has_nan)
  for (int64_t i = 0; i < n; ++i) {
    const float logit = static_cast<float>(logits[i]);
    out[i] = logit;
    has_nan |= logit != logit;
    largest = logit > largest ? logit : largest;
  }
  return has_nan ? std::numeric_limits<float>::quiet_NaN() : largest;
}
MULTIVERSION float widen(const float* logits, float* out, int64_t n) { return widen_row(logits, out, n); }
MULTIVERSION float widen(const BFloat16* logits, float* out, int64_t n) { return widen_row(logits, out, n); }
MULTIVERSION float widen(const Half* logits, float* out, int64_t n) { return widen_row(logits, out, n); }

struct RowSums {
  double partition = 0.0;  // sum of exp(d)
  double weighted = 0.0;   // sum of exp(d) d
};

// d -= largest; weight = exp(d). Blocks are summed in float32 and added in double.
MULTIVERSION RowSums centre(float* d, float* weight, int64_t n, float largest) {
  RowSums sums;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(n, begin + kBlock);
    float partition = 0.0f, weighted = 0.0f;
#pragma omp simd reduction(+ : partition, weighted)
    for (int64_t i = begin; i < end; ++i) {
      const float centred = d[i] - largest;
      const float e = exp_nonpositive(centred);
      d[i] = centred;
      weight[i] = e;
      partition += e;
      weighted += e * std::max(centred, -128.0f);  // e is 0 there; a masked token would add 0 * inf
    }
    sums.partition += partition;
    sums.weighted += weighted;
  }
  return sums;
}

// x = d / temperature; weight = exp(x).
MULTIVERSION void temper(const float* d, float* x, float* weight, int64_t n, float temperature) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    x[i] = d[i] / temperature;
    weight[i] = exp_nonpositive(x[i]);
  }
}

// Zeroes the weight of tokens beyond the limit or below min_p; the masses of blocks and their sum.
MULTIVERSION uint64_t keep(const float* x, float* weight, uint64_t* block_mass, int64_t n, uint32_t limit,
                           float min_p) {
  uint64_t total = 0;
  for (int64_t begin = 0; begin < n; begin += kBlock) {
    const int64_t end = std::min(n, begin + kBlock);
    uint64_t mass = 0;
#pragma omp simd reduction(+ : mass)
    for (int64_t i = begin; i < end; ++i) {
      const float kept = (key_of(x[i]) <= limit) & (weight[i] >= min_p) ? weight[i] : 0.0f;
      weight[i] = kept;
      mass += mass_of(kept);
    }
    block_mass[begin / kBlock] = mass;
    total += mass;
  }
  return total;
}

// The smallest key such that the tokens up to it amount to needed: masses, or tokens if weight is null. A radix select
// of 11, 10 and 10 bits; each pass looks only at tokens that share the bits found so far.
uint32_t select_key(const float* x, const float* weight, int64_t n, double needed) {
  uint32_t found = 0;
  uint64_t below = 0;
  for (int shift = 20, bits = 11; shift >= 0; shift -= 10, bits = 10) {
    std::array<uint64_t, 2048> histogram{};
    const uint32_t last = (1u << bits) - 1;
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t key = key_of(x[i]);
      if ((key ^ found) >> (shift + bits) == 0) histogram[key >> shift & last] += weight ? mass_of(weight[i]) : 1;
    }
    uint32_t bin = 0;
    while (bin < last && static_cast<double>(below + histogram[bin]) < needed) below += histogram[bin++];
    found |= bin << shift;
  }
  return found;
}

// ---- the draw ----

// Words 1 and 0 of Philox4x32-10 (Salmon et al., 2011) as one 64-bit uniform.
uint64_t philox(uint64_t seed, uint64_t position) {
  uint32_t c0 = static_cast<uint32_t>(position), c1 = static_cast<uint32_t>(position >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
  }
  return static_cast<uint64_t>(c1) << 32 | c0;
}

struct Shape {
  float temperature;
  int64_t top_k;
  float top_p;
  float min_p;
  bool operator==(const Shape&) const = default;
};

struct Draw {
  int64_t token;
  double sampling_logprob;
};

// One thread's candidates. Its memory outlives the call, what it knows of the row does not: see forget.
class Candidate {
 public:
  void forget() { row_ = -1; }

  // False if the row holds NaN or +inf, or only -inf.
  template <class T>
  bool load(const T* logits, int64_t row, int64_t vocabulary) {
    if (row == row_) return std::isfinite(largest_);
    row_ = row;
    shape_.reset();
    n_ = vocabulary;
    for (auto* buffer : {&d_, &x_, &weight_}) buffer->resize(n_);
    block_mass_.resize((n_ + kBlock - 1) / kBlock);
    largest_ = widen(logits, d_.data(), n_);
    if (!std::isfinite(largest_)) return false;
    const RowSums sums = centre(d_.data(), weight_.data(), n_, largest_);
    log_partition_ = std::log(sums.partition);
    entropy_ = log_partition_ - sums.weighted / sums.partition;
    return true;
  }

  double entropy() const { return entropy_; }
  double logprob(int64_t token) const { return d_[token] - log_partition_; }

  int64_t argmax() const { return std::find(d_.begin(), d_.end(), 0.0f) - d_.begin(); }

  Draw draw(const Shape& shape, uint64_t seed, uint64_t position) {
    if (shape_ != shape) filter(shape);
    const auto uniform = static_cast<unsigned __int128>(philox(seed, position));
    uint64_t target = static_cast<uint64_t>(uniform * total_ >> 64);
    int64_t token = 0;
    while (token + kBlock < n_ && target >= block_mass_[token / kBlock]) {
      target -= block_mass_[token / kBlock];
      token += kBlock;
    }
    for (; token + 1 < n_ && target >= mass_of(weight_[token]); ++token) target -= mass_of(weight_[token]);
    return {token, d_[token] / shape.temperature - std::log(static_cast<double>(total_) * 0x1p-40)};
  }

 private:
  void filter(const Shape& shape) {
    const bool has_raw_weights = !shape_ && shape.temperature == 1.0f;
    if (!has_raw_weights) temper(d_.data(), x_.data(), weight_.data(), n_, shape.temperature);
    const float* x = has_raw_weights ? d_.data() : x_.data();
    uint32_t limit = kNoLimit;
    if (shape.top_k > 0 && shape.top_k < n_) limit = select_key(x, nullptr, n_, static_cast<double>(shape.top_k));
    if (shape.top_p < 1.0f) {
      const uint64_t total = keep(x, weight_.data(), block_mass_.data(), n_, limit, 0.0f);
      limit = select_key(x, weight_.data(), n_, static_cast<double>(shape.top_p) * static_cast<double>(total));
    }
    total_ = keep(x, weight_.data(), block_mass_.data(), n_, limit, shape.min_p);
    shape_ = shape;
  }

  int64_t row_ = -1, n_ = 0;
  float largest_ = 0.0f;
  double log_partition_ = 0.0, entropy_ = 0.0;
  std::vector<float> d_, x_, weight_;  // [n]
  std::vector<uint64_t> block_mass_;
  uint64_t total_ = 0;
  std::optional<Shape> shape_;  // that weight_ has now; none: exp(d), unfiltered
};

// ---- the op ----

struct Arguments {
  int64_t vocabulary, row_stride;
  const int64_t* row;
  const float* temperature;
  const int64_t* top_k;
  const float *top_p, *min_p;
  const int64_t *seed, *position;
  int64_t* token;
  float *logprob, *sampling_logprob, *entropy;
  int32_t* status;
};

template <class T>
void sample_candidate(const T* logits, const Arguments& a, Candidate& candidate, int64_t n) {
  a.token[n] = -1;
  a.logprob[n] = a.sampling_logprob[n] = a.entropy[n] = 0.0f;
  a.status[n] = 0;
  if (a.row[n] < 0) return;
  if (!candidate.load(logits + a.row[n] * a.row_stride, a.row[n], a.vocabulary)) {
    a.status[n] = 1;
    return;
  }
  if (a.temperature[n] == 0.0f) {
    a.token[n] = candidate.argmax();
  } else {
    const Shape shape{a.temperature[n], a.top_k[n], a.top_p[n], a.min_p[n]};
    const Draw draw = candidate.draw(shape, static_cast<uint64_t>(a.seed[n]), static_cast<uint64_t>(a.position[n]));
    a.token[n] = draw.token;
    a.sampling_logprob[n] = static_cast<float>(draw.sampling_logprob);
  }
  a.logprob[n] = static_cast<float>(candidate.logprob(a.token[n]));
  a.entropy[n] = static_cast<float>(candidate.entropy());
}

template <class T>
void sample_all(const T* logits, const Arguments& arguments, int64_t num_candidates) {
  torch::stable::parallel_for(0, num_candidates, 1, [&](int64_t begin, int64_t end) {
    thread_local Candidate candidate;
    candidate.forget();
    for (int64_t n = begin; n < end; ++n) sample_candidate(logits, arguments, candidate, n);
  });
}

// A few bytes per token: not worth a thread, and here a bad automaton may still raise.
void advance_tags(const Tensor& table, const Tensor& ends, const Tensor& token_bytes, const Tensor& token_offsets,
                  const Tensor& token, const Tensor& tag_state, const Tensor& tag, const Tensor& overhang) {
  const int64_t num_states = table.size(0);
  const StageTags tags{table.const_data_ptr<int32_t>(), ends.const_data_ptr<int32_t>(),
                       token_bytes.const_data_ptr<uint8_t>(), token_offsets.const_data_ptr<int64_t>(),
                       token_offsets.size(0) - 1};
  const auto [lowest, highest] = std::minmax_element(tags.table, tags.table + table.numel());
  STD_TORCH_CHECK(*lowest >= 0 && *highest < num_states, "tag_table must hold states in [0, ", num_states, ")");
  int32_t* state = tag_state.mutable_data_ptr<int32_t>();
  const int64_t* tokens = token.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < token.size(0); ++n) {
    STD_TORCH_CHECK(state[n] >= 0 && state[n] < num_states, "tag_state must be in [0, ", num_states, "), got ",
                    state[n]);
    if (tokens[n] >= 0 && tokens[n] < tags.num_tokens) {
      const int64_t begin = tags.token_offsets[tokens[n]], end = tags.token_offsets[tokens[n] + 1];
      STD_TORCH_CHECK(0 <= begin && begin <= end && end <= token_bytes.size(0),
                      "token_offsets must ascend inside token_bytes, got ", begin, " and ", end);
    }
    const TagStep step = advance(tags, state[n], tokens[n]);
    state[n] = step.state;
    tag.mutable_data_ptr<int32_t>()[n] = step.tag;
    overhang.mutable_data_ptr<int32_t>()[n] = step.overhang;
  }
}

#define CHECK_VECTOR(tensor, expected, dtype) \
  CHECK_DIM(tensor, 1);                       \
  CHECK_SIZE(tensor, 0, expected);            \
  CHECK_DTYPE(tensor, dtype);                 \
  CHECK_CONTIGUOUS(tensor)

void check_tags(const Tensor& tag_table, const Tensor& tag_ends, const Tensor& token_bytes,
                const Tensor& token_offsets) {
  CHECK_DIM(tag_table, 2);
  CHECK_SIZE(tag_table, 1, 256);
  CHECK_DTYPE(tag_table, Int);
  CHECK_CONTIGUOUS(tag_table);
  STD_TORCH_CHECK(tag_table.size(0) > 0, "tag_table must have a start state");
  CHECK_VECTOR(tag_ends, tag_table.size(0), Int);
  CHECK_VECTOR(token_bytes, token_bytes.numel(), Byte);
  CHECK_VECTOR(token_offsets, token_offsets.numel(), Long);
  STD_TORCH_CHECK(token_offsets.size(0) > 0, "token_offsets must have num_tokens + 1 entries, got none");
}

void sample(const Tensor& logits, const Tensor& row, const Tensor& temperature, const Tensor& top_k,
            const Tensor& top_p, const Tensor& min_p, const Tensor& seed, const Tensor& position,
            const std::optional<Tensor>& tag_table, const std::optional<Tensor>& tag_ends,
            const std::optional<Tensor>& token_bytes, const std::optional<Tensor>& token_offsets, const Tensor& token,
            const Tensor& logprob, const Tensor& sampling_logprob, const Tensor& entropy, const Tensor& tag_state,
            const Tensor& tag, const Tensor& overhang, const Tensor& status) {
  CHECK_DIM(logits, 2);
  const int64_t num_rows = logits.size(0), vocabulary = logits.size(1), n = row.numel();
  STD_TORCH_CHECK(vocabulary > 0 && vocabulary < (1 << 23), "logits must have 1 <= V < 2**23, got ", vocabulary);
  STD_TORCH_CHECK(vocabulary == 1 || logits.stride(1) == 1, "logits must have stride 1 in dimension 1");
  CHECK_VECTOR(row, n, Long);
  CHECK_VECTOR(temperature, n, Float);
  CHECK_VECTOR(top_k, n, Long);
  CHECK_VECTOR(top_p, n, Float);
  CHECK_VECTOR(min_p, n, Float);
  CHECK_VECTOR(seed, n, Long);
  CHECK_VECTOR(position, n, Long);
  CHECK_VECTOR(token, n, Long);
  CHECK_VECTOR(logprob, n, Float);
  CHECK_VECTOR(sampling_logprob, n, Float);
  CHECK_VECTOR(entropy, n, Float);
  CHECK_VECTOR(tag_state, n, Int);
  CHECK_VECTOR(tag, n, Int);
  CHECK_VECTOR(overhang, n, Int);
  CHECK_VECTOR(status, n, Int);
  const Arguments arguments{vocabulary, logits.stride(0), row.const_data_ptr<int64_t>(),
                            temperature.const_data_ptr<float>(), top_k.const_data_ptr<int64_t>(),
                            top_p.const_data_ptr<float>(), min_p.const_data_ptr<float>(),
                            seed.const_data_ptr<int64_t>(), position.const_data_ptr<int64_t>(),
                            token.mutable_data_ptr<int64_t>(), logprob.mutable_data_ptr<float>(),
                            sampling_logprob.mutable_data_ptr<float>(), entropy.mutable_data_ptr<float>(),
                            status.mutable_data_ptr<int32_t>()};
  for (int64_t i = 0; i < n; ++i)
    STD_TORCH_CHECK(arguments.row[i] < num_rows, "row must be below R=", num_rows, ", got ", arguments.row[i]);

  switch (logits.scalar_type()) {
    case ScalarType::Float: sample_all(logits.const_data_ptr<float>(), arguments, n); break;
    case ScalarType::BFloat16: sample_all(logits.const_data_ptr<BFloat16>(), arguments, n); break;
    case ScalarType::Half: sample_all(logits.const_data_ptr<Half>(), arguments, n); break;
    default: STD_TORCH_CHECK(false, "logits must be float32, bfloat16 or float16");
  }

  if (tag_table) {
    STD_TORCH_CHECK(tag_ends && token_bytes && token_offsets, "a tag automaton must come with all of its tensors");
    check_tags(*tag_table, *tag_ends, *token_bytes, *token_offsets);
    advance_tags(*tag_table, *tag_ends, *token_bytes, *token_offsets, token, tag_state, tag, overhang);
  } else {
    std::fill_n(tag.mutable_data_ptr<int32_t>(), n, -1);
    std::fill_n(overhang.mutable_data_ptr<int32_t>(), n, 0);
  }
}

STABLE_TORCH_LIBRARY_IMPL(llava_cot_kernels, CPU, m) { m.impl("sample", TORCH_BOX(&sample)); }

}  // namespace
}  // namespace llava_cot
