// Seeded sampling, as defined in llava_cot_kernels/sampling.py. A candidate takes three steps:
//   load   its row: largest logit, and the raw distribution's partition function and entropy
//   filter x = (l - largest) / temperature, integer masses of blocks of tokens, and which keys (see isa.h) are kept
//   draw   Philox, then the inverse CDF: first over blocks, then inside one
// The candidates of a fork are adjacent and share load and filter, so a fork costs one pass.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>
#include <optional>
#include <vector>

#include "cpu/dtype.h"
#include "cpu/isa.h"
#include "draw.h"
#include "sampling_checks.h"

namespace llava_cot {
namespace {

using torch::stable::Tensor;

constexpr int32_t LAST_KEY = 0x7f800000;  // the key of -inf

// ---- which keys are kept ----

// Finds thresholds among the keys of a row. A histogram narrows them down to one bin. The tokens of that bin are copied
// out, and a finer histogram narrows them further. The memory outlives the call.
class KeySelect {
 public:
  // Returns the smallest key such that there are at least `count` tokens up to it.
  int32_t by_count(const Tokens& tokens, int64_t count) {
    tokens_ = tokens;
    return select(LAST_KEY, false, static_cast<double>(count), 0);
  }

  // Returns the smallest key such that the tokens up to it have that share of the mass `total` of all. Tokens beyond
  // `limit` weigh 0.
  int32_t by_mass(const Tokens& tokens, int32_t limit, double share, uint64_t total) {
    tokens_ = tokens;
    const double needed = share * static_cast<double>(total);
    const bool is_flat = static_cast<double>(total) * 0x1p-40 > static_cast<double>(tokens.count) / 8;
    return select(limit, true, needed, is_flat ? take_out_likely(limit, share, needed) : 0);
  }

 private:
  // Bins are fine near the largest logit and coarse far from it: 64 for each power of two from 2^-10 to 2^6, since a
  // row may spread over hundredths or over tens.
  static constexpr Bins ALL_BINS{std::bit_cast<int32_t>(0x1p-10f), 17};

  struct Range {
    int32_t first, last;
  };

  int32_t select(int32_t limit, bool by_mass, double needed, uint64_t below) {
    Bins bins = ALL_BINS;
    Range range{0, LAST_KEY};
    for (;;) {
      histogram_.fill(0);
      loops().histogram(tokens_, std::min(limit, range.last), by_mass, bins, histogram_.data());
      range = keys_of(find_bin(needed, below), bins, range);
      if (range.first == range.last) return range.first;
      const Compacted inside = take_out(range);
      if (inside.smallest >= inside.largest) return inside.smallest;
      tokens_ = inside.tokens;
      range = {inside.smallest, inside.largest};
      const int bits = static_cast<int>(std::bit_width(static_cast<uint32_t>(range.last - range.first)));
      bins = {range.first, std::max(0, bits - BIN_BITS)};
    }
  }

  // In a flat row most tokens would go through the histogram. So every eighth block is used to predict a range with the
  // threshold, and exact sums verify it. Only tokens in the range remain. Returns the mass of the tokens before it.
  uint64_t take_out_likely(int32_t limit, double share, double needed) {
    constexpr double MARGIN = 1.0 / 32;
    const Tokens all = tokens_;
    histogram_.fill(0);
    for (int64_t begin = 0; begin < all.count; begin += 8 * BLOCK) {
      const Tokens block{all.x + begin, all.weight + begin, std::min(BLOCK, all.count - begin)};
      loops().histogram(block, limit, true, ALL_BINS, histogram_.data());
    }
    const auto sampled = static_cast<double>(std::accumulate(histogram_.begin(), histogram_.end(), uint64_t{0}));
    uint64_t ignored = 0;
    const int32_t low = find_bin((share - MARGIN) * sampled, ignored);
    const int32_t high = find_bin((share + MARGIN) * sampled, ignored = 0);
    const Range range{keys_of(low, ALL_BINS, {0, LAST_KEY}).first, keys_of(high, ALL_BINS, {0, LAST_KEY}).last};
    block_masses_.resize((all.count + BLOCK - 1) / BLOCK);
    const auto mass_up_to = [&](const Tokens& tokens, int32_t key) {
      return loops().keep(tokens, {std::min(limit, key), 0.0f}, block_masses_.data());
    };
    const uint64_t below = mass_up_to(all, range.first - 1);
    const Tokens inside = take_out(range).tokens;
    const double reached = static_cast<double>(below + mass_up_to(inside, range.last));
    if (static_cast<double>(below) >= needed || reached < needed) return 0;
    tokens_ = inside;
    return below;
  }

  Compacted take_out(Range range) {
    // The padding may be copied too; more is added anyway.
    for (auto* list : {&x_, &weight_}) list->resize(std::max<size_t>(list->size(), tokens_.count + 2 * LANES));
    return loops().compact(tokens_, range.first, range.last, x_.data(), weight_.data());
  }

  static Range keys_of(int32_t bin, Bins bins, Range range) {
    if (bin > 0) range.first = bins.base + (bin << bins.shift);
    if (bin < NUM_BINS - 1) range.last = std::min(range.last, bins.base + ((bin + 1) << bins.shift) - 1);
    return range;
  }

  // Returns the bin in which the running sum reaches `needed`, and sets `below` to the sum before it.
  int32_t find_bin(double needed, uint64_t& below) const {
    for (int32_t bin = 0;; ++bin) {
      const uint64_t* copies = &histogram_[bin * BIN_COPIES];
      uint64_t amount = 0;
      for (int i = 0; i < BIN_COPIES; ++i) amount += copies[i];
      if (bin == NUM_BINS - 1 || static_cast<double>(below + amount) >= needed) return bin;
      below += amount;
    }
  }

  Tokens tokens_{};
  std::array<uint64_t, NUM_BINS * BIN_COPIES> histogram_;
  std::vector<float> x_, weight_;
  std::vector<uint64_t> block_masses_;
};

// Returns a key beyond which there is less than the share 1 - top_p of the mass `total`, so the threshold of top_p is
// not there: n tokens weigh at most n exp(x) together. 1 % is left for rounding.
int32_t last_key_that_matters(double top_p, uint64_t total, int64_t n) {
  const double x = std::log((1.0 - top_p) * static_cast<double>(total) * 0x1p-40 / static_cast<double>(n)) - 0.01;
  return x < 0.0 ? std::bit_cast<int32_t>(static_cast<float>(-x)) : LAST_KEY;
}

// ---- the draw ----

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

// The candidates of one thread. Its memory outlives the call, but its knowledge of the row does not; see forget.
class Candidate {
 public:
  void forget() { row_ = -1; }

  // Returns false if the row has NaN or +inf, or nothing but -inf.
  bool load(Dtype dtype, const void* logits, int64_t row, int64_t vocabulary) {
    if (row == row_) return std::isfinite(largest_);
    row_ = row;
    shape_.reset();
    dtype_ = dtype;
    logits_ = logits;
    n_ = vocabulary;
    for (auto* buffer : {&x_, &weight_}) buffer->resize((n_ + LANES - 1) / LANES * LANES);
    block_masses_.resize((n_ + BLOCK - 1) / BLOCK);
    largest_ = loops().largest(dtype, logits, n_);
    if (!std::isfinite(largest_)) return false;
    const RowSums sums = loops().row_sums(dtype, logits, n_, largest_);
    log_partition_ = std::log(sums.partition);
    entropy_ = log_partition_ - sums.weighted / sums.partition;
    return true;
  }

  double entropy() const { return entropy_; }
  double logprob(int64_t token) const { return centred(token) - log_partition_; }
  int64_t argmax() const { return loops().find(dtype_, logits_, n_, largest_); }

  Draw draw(const Shape& shape, uint64_t seed, uint64_t position) {
    if (shape_ != shape) filter(shape);
    const auto uniform = static_cast<unsigned __int128>(philox(seed, position));
    uint64_t target = static_cast<uint64_t>(uniform * total_ >> 64);
    int64_t block = 0;
    while ((block + 1) * BLOCK < n_ && target >= block_masses_[block]) target -= block_masses_[block++];
    const int64_t begin = block * BLOCK, count = std::min(BLOCK, n_ - begin);
    std::array<uint64_t, BLOCK> masses;
    loops().masses({x_.data() + begin, weight_.data() + begin, count}, kept_, masses.data());
    int64_t i = 0;
    for (; i + 1 < count && target >= masses[i]; ++i) target -= masses[i];
    const float x = centred(begin + i) / shape.temperature;
    return {begin + i, x - std::log(static_cast<double>(total_) * 0x1p-40)};
  }

 private:
  float centred(int64_t token) const {
    float logit;
    loops().widen(dtype_, static_cast<const char*>(logits_) + token * size_of(dtype_), 1, &logit);
    return logit - largest_;
  }

  void filter(const Shape& shape) {
    const Tokens tokens{x_.data(), weight_.data(), n_};
    total_ = loops().shape(dtype_, logits_, n_, largest_, shape.temperature, x_.data(), weight_.data(),
                           block_masses_.data());
    kept_ = {LAST_KEY, 0.0f};
    if (shape.top_k > 0 && shape.top_k < n_) {
      kept_.limit = select_.by_count(tokens, shape.top_k);
      total_ = loops().keep(tokens, kept_, block_masses_.data());
    }
    if (shape.top_p < 1.0f) {
      const int32_t limit = std::min(kept_.limit, last_key_that_matters(shape.top_p, total_, n_));
      kept_.limit = select_.by_mass(tokens, limit, shape.top_p, total_);
    }
    kept_.min_p = shape.min_p;
    if (shape.top_p < 1.0f || shape.min_p > 0.0f) total_ = loops().keep(tokens, kept_, block_masses_.data());
    shape_ = shape;
  }

  int64_t row_ = -1, n_ = 0;
  Dtype dtype_ = Dtype::FLOAT32;
  const void* logits_ = nullptr;
  float largest_ = 0.0f;
  double log_partition_ = 0.0, entropy_ = 0.0;
  std::vector<float> x_, weight_;  // [n, rounded up to LANES]
  std::vector<uint64_t> block_masses_;
  uint64_t total_ = 0;
  Kept kept_{LAST_KEY, 0.0f};
  std::optional<Shape> shape_;  // the shape that the masses have now
  KeySelect select_;
};

// ---- the op ----

struct Arguments : Candidates {
  Dtype dtype;
  const char* logits;
  int64_t vocabulary, row_bytes;
};

void sample_candidate(const Arguments& a, Candidate& candidate, int64_t n) {
  a.token[n] = -1;
  a.logprob[n] = a.entropy[n] = a.sampling_logprob[n] = 0.0f;
  a.status[n] = 0;
  if (a.row[n] < 0) return;
  if (!candidate.load(a.dtype, a.logits + a.row[n] * a.row_bytes, a.row[n], a.vocabulary)) {
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

// There are only a few bytes per token, not enough for a thread. A bad automaton can still raise here.
void advance_tags(const StageTags& tags, const Candidates& c, int64_t num_candidates) {
  if (!tags.table) {
    std::fill_n(c.tag, num_candidates, -1);
    std::fill_n(c.overhang, num_candidates, 0);
    return;
  }
  const auto [lowest, highest] = std::minmax_element(tags.table, tags.table + tags.num_states * 256);
  STD_TORCH_CHECK(*lowest >= 0 && *highest < tags.num_states, "tag_table must hold states in [0, ", tags.num_states,
                  ")");
  for (int64_t n = 0; n < num_candidates; ++n) {
    const int64_t token = c.token[n];
    STD_TORCH_CHECK(c.tag_state[n] >= 0 && c.tag_state[n] < tags.num_states, "tag_state must be in [0, ",
                    tags.num_states, "), got ", c.tag_state[n]);
    if (token >= 0 && token < tags.num_tokens) {
      const int64_t begin = tags.token_offsets[token], end = tags.token_offsets[token + 1];
      STD_TORCH_CHECK(0 <= begin && begin <= end && end <= tags.num_bytes,
                      "token_offsets must ascend inside token_bytes, got ", begin, " and ", end);
    }
    const TagStep step = advance(tags, c.tag_state[n], token);
    c.tag_state[n] = step.state;
    c.tag[n] = step.tag;
    c.overhang[n] = step.overhang;
  }
}

void sample(const Tensor& logits, const Tensor& row, const Tensor& temperature, const Tensor& top_k,
            const Tensor& top_p, const Tensor& min_p, const Tensor& seed, const Tensor& position,
            const std::optional<Tensor>& tag_table, const std::optional<Tensor>& tag_ends,
            const std::optional<Tensor>& token_bytes, const std::optional<Tensor>& token_offsets, const Tensor& token,
            const Tensor& logprob, const Tensor& entropy, const Tensor& sampling_logprob, const Tensor& tag_state,
            const Tensor& tag, const Tensor& overhang, const Tensor& status) {
  check_logits(logits);
  const Candidates candidates =
      check_candidates(row, temperature, top_k, top_p, min_p, seed, position, token, logprob, entropy, sampling_logprob,
                       tag_state, tag, overhang, status);
  const StageTags tags = check_tags(tag_table, tag_ends, token_bytes, token_offsets);
  const int64_t num_rows = logits.size(0), n = row.numel();
  const Dtype dtype = dtype_of(logits, "logits");
  const Arguments arguments{candidates, dtype, static_cast<const char*>(logits.const_data_ptr()), logits.size(1),
                            logits.stride(0) * size_of(dtype)};
  for (int64_t i = 0; i < n; ++i)
    STD_TORCH_CHECK(arguments.row[i] < num_rows, "row must be below R=", num_rows, ", got ", arguments.row[i]);

  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) {
    thread_local Candidate candidate;
    candidate.forget();
    for (int64_t i = begin; i < end; ++i) sample_candidate(arguments, candidate, i);
  });
  advance_tags(tags, candidates, n);
}

STABLE_TORCH_LIBRARY_IMPL(llava_cot_kernels, CPU, m) { m.impl("sample", TORCH_BOX(&sample)); }

}  // namespace
}  // namespace llava_cot
