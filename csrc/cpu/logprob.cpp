// Log-probs of given tokens: a running softmax over pieces of the vocabulary, merged in a fixed order.
//   token_logprobs            the logits are in memory: (row, piece) pairs run in parallel
//   linear_logprobs           the logits come tile by tile from ATen's float32 GEMM and never leave the tile
//   linear_logprobs_backward  the same tiles again, turned into the logits' gradient in place, then two more GEMMs
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "checks.h"
#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace llava_cot {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

constexpr int64_t kIgnoreIndex = -100;
constexpr float kInf = std::numeric_limits<float>::infinity();
// Two passes (maximum, then sum) read a piece: 16 KiB of float32 are still in L1 at the second. The pieces are the
// same for every thread count, and so is the result.
constexpr int64_t kPiece = 4096;
// Of each buffer (the weight tile as float32, its gradient; the logits and a partial product are smaller at the usual
// sizes). Small, so that what one step wrote is still in
// L2 or L3 when the next reads it; but below 4 MiB (512 tokens at H = 2048) the GEMM itself was measured to slow down.
constexpr int64_t kTileBytes = 6 << 20;
// Elements per task below which a thread costs more than it brings.
constexpr int64_t kGrain = 32768;
// Merging a piece costs about as much as reducing this many elements.
constexpr int64_t kMergeCost = 64;

int64_t grain(int64_t elements) { return kGrain / std::clamp<int64_t>(elements, 1, kGrain); }

// ---- rows of any dtype, read as float32 ----

class FloatRows {
 public:
  FloatRows(const Tensor& matrix, const char* name)
      : data_(static_cast<const char*>(matrix.const_data_ptr())), dtype_(dtype_of(matrix, name)) {
    STD_TORCH_CHECK(matrix.dim() == 2, name, " must have 2 dimensions, got ", matrix.dim());
    STD_TORCH_CHECK(matrix.size(1) <= 1 || matrix.stride(1) == 1, name, " must have stride 1 in dimension 1");
    stride_ = matrix.stride(0);
  }

  bool is_float32() const { return dtype_ == Dtype::FLOAT32; }
  int64_t stride() const { return stride_; }

  // matrix[row, col : col + n]: in place if it is float32, else widened into buffer.
  const float* read(int64_t row, int64_t col, int64_t n, float* buffer) const {
    const char* data = data_ + (row * stride_ + col) * size_of(dtype_);
    if (is_float32()) return reinterpret_cast<const float*>(data);
    loops().widen(dtype_, data, n, buffer);
    return buffer;
  }

 private:
  const char* data_;
  Dtype dtype_;
  int64_t stride_;
};

// ---- running softmax ----

struct Softmax {
  double scale = 1;
  float max = -kInf;
  double sum = 0, weighted = 0;

  void merge(const Piece& piece) {
    const float before = max;
    max = std::max(max, piece.max);
    const double d0 = distance(before), d1 = distance(piece.max);
    const double e0 = std::exp(d0), e1 = std::exp(d1);
    weighted = e0 * (weighted + d0 * sum) + e1 * (piece.weighted + d1 * piece.sum);
    sum = e0 * sum + e1 * piece.sum;
  }
  float logprob(float x) const { return static_cast<float>(scale * (static_cast<double>(x) - max) - std::log(sum)); }
  float lse() const { return static_cast<float>(scale * max + std::log(sum)); }
  float entropy() const { return static_cast<float>(std::log(sum) - weighted / sum); }

 private:
  // scale * (old - max), but finite: exp(-1000) is 0 in double, and 0 * -1000 is 0 where 0 * -inf would be NaN.
  double distance(float old) const {
    return old == max ? 0.0 : std::max(scale * (static_cast<double>(old) - max), -1000.0);
  }
};

// ---- checks ----

void check_row_vector(const Tensor& vector, const char* name, int64_t rows, ScalarType dtype = ScalarType::Float) {
  STD_TORCH_CHECK(vector.dim() == 1 && vector.size(0) == rows, name, " must have shape [T=", rows, "]");
  STD_TORCH_CHECK(vector.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(vector.scalar_type() == dtype, name, " has the wrong dtype");
}

// The rows whose target is a token, in order.
std::vector<int64_t> kept_rows(const Tensor& targets, int64_t rows, int64_t vocab_size) {
  check_row_vector(targets, "targets", rows, ScalarType::Long);
  const int64_t* target = targets.const_data_ptr<int64_t>();
  std::vector<int64_t> kept;
  kept.reserve(rows);
  for (int64_t row = 0; row < rows; ++row) {
    if (target[row] == kIgnoreIndex) continue;
    STD_TORCH_CHECK(target[row] >= 0 && target[row] < vocab_size, "targets must be -100 or in [0, ", vocab_size,
                    "), got ", target[row], " at ", row);
    kept.push_back(row);
  }
  return kept;
}

// ---- token_logprobs ----

void token_logprobs(Tensor logits, Tensor targets, Tensor logprobs) {
  const FloatRows source(logits, "logits");
  const int64_t rows = logits.size(0), vocab_size = logits.size(1);
  check_row_vector(logprobs, "logprobs", rows);
  const std::vector<int64_t> kept = kept_rows(targets, rows, vocab_size);
  const int64_t num_kept = static_cast<int64_t>(kept.size());
  torch::stable::zero_(logprobs);

  const int64_t pieces_per_row = (vocab_size + kPiece - 1) / kPiece;
  std::vector<Piece> pieces(num_kept * pieces_per_row);
  parallel_for(0, num_kept * pieces_per_row, grain(std::min(vocab_size, kPiece)), [&](int64_t begin, int64_t end) {
    alignas(64) float buffer[kPiece];
    for (int64_t i = begin; i < end; ++i) {
      const int64_t col = i % pieces_per_row * kPiece, n = std::min(kPiece, vocab_size - col);
      pieces[i] = loops().reduce_piece(source.read(kept[i / pieces_per_row], col, n, buffer), n, 1.0f);
    }
  });

  const int64_t* target = targets.const_data_ptr<int64_t>();
  float* out = logprobs.mutable_data_ptr<float>();
  parallel_for(0, num_kept, grain(kMergeCost * pieces_per_row), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      Softmax softmax;
      for (int64_t p = 0; p < pieces_per_row; ++p) softmax.merge(pieces[k * pieces_per_row + p]);
      float buffer;
      out[kept[k]] = softmax.logprob(*source.read(kept[k], target[kept[k]], 1, &buffer));
    }
  });
}

// ---- linear_logprobs ----

Tensor empty_float32(int64_t rows, int64_t cols) {
  return torch::stable::empty({rows, cols}, ScalarType::Float, std::nullopt,
                              torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

// A float32 matrix over memory that someone else holds; being new, it has no autograd history.
Tensor view_matrix(const float* data, int64_t rows, int64_t cols, int64_t row_stride) {
  return torch::stable::from_blob(const_cast<float*>(data), {rows, cols}, {row_stride, 1},
                                  torch::stable::Device(torch::headeronly::DeviceType::CPU), ScalarType::Float);
}

Tensor view_matrix(const float* data, int64_t rows, int64_t cols) { return view_matrix(data, rows, cols, cols); }

// out = a @ b. Not torch::stable::matmul, which would allocate and page in a fresh tile every time.
void mm_out(const Tensor& a, const Tensor& b, const Tensor& out) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                    torch::stable::detail::from(out)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION));
  (void)torch::stable::detail::to<Tensor>(stack[0]);  // the returned handle to out is ours to free
}

struct Tile {
  int64_t row, token;  // of the first: among the kept rows, in the vocabulary
  Tensor hidden;       // [rows, H]
  Tensor weight;       // [tokens, H]
  Tensor logits;       // [rows, tokens], before the temperature; the visitor may overwrite them
};

// hidden @ weight.T over the kept rows, a tile at a time: for each vocabulary tile, each row tile. All is float32: a
// bfloat16 GEMM would round the logits before the softmax.
class LogitTiles {
 public:
  LogitTiles(const Tensor& hidden, const Tensor& weight, const Tensor& targets)
      : weight_(weight, "weight"), vocab_size_(weight.size(0)) {
    const FloatRows source(hidden, "hidden");
    hidden_size_ = hidden.size(1);
    CHECK_SIZE(weight, 1, hidden_size_);
    STD_TORCH_CHECK(weight.scalar_type() == hidden.scalar_type(), "weight must have the dtype of hidden");
    kept = kept_rows(targets, hidden.size(0), vocab_size_);
    const int64_t budget = kTileBytes / static_cast<int64_t>(sizeof(float)), width = std::max<int64_t>(1, hidden_size_);
    tile_tokens = std::min(vocab_size_, std::max<int64_t>(16, budget / width));
    tile_rows = std::min(num_kept(), std::max<int64_t>(16, budget / std::max(width, tile_tokens)));
    const bool in_place = source.is_float32() && num_kept() == hidden.size(0);
    hidden_ = in_place ? view_matrix(source.read(0, 0, 0, nullptr), num_kept(), hidden_size_, source.stride())
                       : gather(source);
  }

  int64_t num_kept() const { return static_cast<int64_t>(kept.size()); }

  template <class Visitor>
  void for_each(const Visitor& visit) const {
    if (kept.empty()) return;
    const Tensor logits = empty_float32(tile_rows, tile_tokens);
    const Tensor widened = empty_float32(weight_.is_float32() ? 0 : tile_tokens, hidden_size_);
    for (int64_t token = 0; token < vocab_size_; token += tile_tokens) {
      const int64_t num_tokens = std::min(tile_tokens, vocab_size_ - token);
      const Tensor weight = read_weight(token, num_tokens, widened);
      for (int64_t row = 0; row < num_kept(); row += tile_rows) {
        const int64_t num_rows = std::min(tile_rows, num_kept() - row);
        const float* hidden = hidden_.const_data_ptr<float>() + row * hidden_.stride(0);
        const Tile tile{row, token, view_matrix(hidden, num_rows, hidden_size_, hidden_.stride(0)), weight,
                        view_matrix(logits.const_data_ptr<float>(), num_rows, num_tokens)};
        mm_out(tile.hidden, torch::stable::transpose(weight, 0, 1), tile.logits);
        visit(tile);
      }
    }
  }

  std::vector<int64_t> kept;
  int64_t tile_rows, tile_tokens;  // of a full tile

 private:
  Tensor gather(const FloatRows& source) const {
    const Tensor gathered = empty_float32(num_kept(), hidden_size_);
    float* out = gathered.mutable_data_ptr<float>();
    parallel_for(0, num_kept(), grain(hidden_size_), [&](int64_t begin, int64_t end) {
      for (int64_t k = begin; k < end; ++k) {
        float* row = out + k * hidden_size_;
        const float* x = source.read(kept[k], 0, hidden_size_, row);
        if (x != row) std::copy_n(x, hidden_size_, row);
      }
    });
    return gathered;
  }

  Tensor read_weight(int64_t token, int64_t num_tokens, const Tensor& widened) const {
    float* out = widened.mutable_data_ptr<float>();
    if (weight_.is_float32()) {
      return view_matrix(weight_.read(token, 0, hidden_size_, out), num_tokens, hidden_size_, weight_.stride());
    }
    parallel_for(0, num_tokens, grain(hidden_size_), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) weight_.read(token + i, 0, hidden_size_, out + i * hidden_size_);
    });
    return view_matrix(out, num_tokens, hidden_size_);
  }

  FloatRows weight_;
  int64_t vocab_size_, hidden_size_;
  Tensor hidden_;  // float32 [num_kept, H]: the caller's where that will do, else gathered
};

// visit(kept row, its logits) for each row of the tile, in parallel.
template <class Visitor>
void for_each_row(const Tile& tile, const Visitor& visit) {
  float* logits = tile.logits.mutable_data_ptr<float>();
  const int64_t num_tokens = tile.logits.size(1);
  parallel_for(0, tile.logits.size(0), grain(num_tokens), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) visit(tile.row + i, logits + i * num_tokens);
  });
}

void linear_logprobs(Tensor hidden, Tensor weight, Tensor targets, double temperature, Tensor logprobs, Tensor lse,
                     Tensor entropy) {
  const LogitTiles tiles(hidden, weight, targets);
  STD_TORCH_CHECK(temperature > 0, "temperature must be > 0, got ", temperature);
  const float scale = static_cast<float>(1 / temperature);
  for (Tensor* out : {&logprobs, &lse, &entropy}) {
    check_row_vector(*out, "each output", hidden.size(0));
    torch::stable::zero_(*out);
  }
  const int64_t* target = targets.const_data_ptr<int64_t>();
  std::vector<Softmax> softmax(tiles.num_kept(), Softmax{1 / temperature});
  std::vector<float> target_logit(tiles.num_kept());
  tiles.for_each([&](const Tile& tile) {
    const int64_t num_tokens = tile.logits.size(1);
    for_each_row(tile, [&](int64_t k, const float* x) {
      const int64_t index = target[tiles.kept[k]] - tile.token;
      if (index >= 0 && index < num_tokens) target_logit[k] = x[index];
      for (int64_t col = 0; col < num_tokens; col += kPiece) {
        softmax[k].merge(loops().reduce_piece(x + col, std::min(kPiece, num_tokens - col), scale));
      }
    });
  });
  for (int64_t k = 0; k < tiles.num_kept(); ++k) {
    const int64_t row = tiles.kept[k];
    logprobs.mutable_data_ptr<float>()[row] = softmax[k].logprob(target_logit[k]);
    lse.mutable_data_ptr<float>()[row] = softmax[k].lse();
    entropy.mutable_data_ptr<float>()[row] = softmax[k].entropy();
  }
}

// ---- linear_logprobs_backward ----

// Float32 sums of a gradient: the gradient itself where it has that dtype, else memory of its own, cast into place at
// the end.
Tensor sums_of(const Tensor& gradient, int64_t rows) {
  return gradient.scalar_type() == ScalarType::Float ? gradient : empty_float32(rows, gradient.size(1));
}

// sum = or += a @ b. The first product is stored, not added; others pass through a scratch that grows to their size.
class Accumulator {
 public:
  void operator()(const Tensor& a, const Tensor& b, float* sum, bool first) {
    const int64_t rows = a.size(0), cols = b.size(1);
    if (!first && (!scratch_ || scratch_->numel() < rows * cols)) scratch_ = empty_float32(rows, cols);
    float* product = first ? sum : scratch_->mutable_data_ptr<float>();
    mm_out(a, b, view_matrix(product, rows, cols));
    if (first) return;
    parallel_for(0, rows, grain(cols), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * cols; i < end * cols; ++i) sum[i] += product[i];
    });
  }

 private:
  std::optional<Tensor> scratch_;
};

// The sum's first rows are the kept ones: spread them out in place, last first (kept[k] >= k), and zero the others.
void spread_rows(const Tensor& sum, const std::vector<int64_t>& kept) {
  const int64_t cols = sum.size(1);
  float* rows = sum.mutable_data_ptr<float>();
  int64_t k = static_cast<int64_t>(kept.size()) - 1;
  for (int64_t row = sum.size(0) - 1; row >= 0; --row) {
    if (k < 0 || kept[k] != row) {
      std::fill_n(rows + row * cols, cols, 0.0f);
    } else if (k-- != row) {
      std::copy_n(rows + (k + 1) * cols, cols, rows + row * cols);
    }
  }
}

void check_gradient(const Tensor& grad, const Tensor& of, const char* name) {
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == of.size(0) && grad.size(1) == of.size(1) &&
                      grad.scalar_type() == of.scalar_type() && grad.is_contiguous(),
                  name, " must be contiguous, with the shape and dtype of its tensor");
}

void linear_logprobs_backward(Tensor grad_logprobs, Tensor grad_entropy, Tensor hidden, Tensor weight, Tensor targets,
                              Tensor lse, Tensor entropy, double temperature, std::optional<Tensor> grad_hidden,
                              std::optional<Tensor> grad_weight) {
  const LogitTiles tiles(hidden, weight, targets);
  STD_TORCH_CHECK(temperature > 0, "temperature must be > 0, got ", temperature);
  const float scale = static_cast<float>(1 / temperature);
  for (const Tensor* in : {&grad_logprobs, &grad_entropy, &lse, &entropy}) {
    check_row_vector(*in, "each gradient and statistic", hidden.size(0));
  }
  if (grad_hidden) check_gradient(*grad_hidden, hidden, "grad_hidden");
  if (grad_weight) check_gradient(*grad_weight, weight, "grad_weight");
  if (grad_weight && tiles.num_kept() == 0) torch::stable::zero_(*grad_weight);

  const int64_t width = hidden.size(1);
  const bool is_float32 = hidden.scalar_type() == ScalarType::Float;
  const Tensor none = empty_float32(0, width);
  const Tensor hidden_sum = grad_hidden ? sums_of(*grad_hidden, hidden.size(0)) : none;
  const Tensor weight_sum = grad_weight ? sums_of(*grad_weight, tiles.tile_tokens) : none;
  Accumulator accumulate;
  const int64_t* target = targets.const_data_ptr<int64_t>();
  const float *g_logprob = grad_logprobs.const_data_ptr<float>(), *g_entropy = grad_entropy.const_data_ptr<float>();
  const float *row_lse = lse.const_data_ptr<float>(), *row_entropy = entropy.const_data_ptr<float>();

  tiles.for_each([&](const Tile& tile) {
    const int64_t num_rows = tile.logits.size(0), num_tokens = tile.logits.size(1);
    for_each_row(tile, [&](int64_t k, float* x) {
      const int64_t row = tiles.kept[k], index = target[row] - tile.token;
      loops().logits_to_gradient(x, num_tokens,
                                 {scale, row_lse[row], row_entropy[row], g_logprob[row], g_entropy[row]});
      if (index >= 0 && index < num_tokens) x[index] += scale * g_logprob[row];
    });
    if (grad_hidden) {
      float* sum = hidden_sum.mutable_data_ptr<float>() + tile.row * width;
      accumulate(tile.logits, tile.weight, sum, tile.token == 0);
    }
    if (grad_weight) {
      float* sum = weight_sum.mutable_data_ptr<float>() + (is_float32 ? tile.token * width : 0);
      accumulate(torch::stable::transpose(tile.logits, 0, 1), tile.hidden, sum, tile.row == 0);
      if (is_float32 || tile.row + num_rows < tiles.num_kept()) return;
      Tensor rows = torch::stable::narrow(*grad_weight, 0, tile.token, num_tokens);
      torch::stable::copy_(rows, view_matrix(sum, num_tokens, width));
    }
  });
  if (!grad_hidden) return;
  spread_rows(hidden_sum, tiles.kept);
  if (!is_float32) torch::stable::copy_(*grad_hidden, hidden_sum);
}

}  // namespace
}  // namespace llava_cot

STABLE_TORCH_LIBRARY_IMPL(llava_cot_kernels, CPU, m) {
  m.impl("token_logprobs", TORCH_BOX(&llava_cot::token_logprobs));
  m.impl("linear_logprobs", TORCH_BOX(&llava_cot::linear_logprobs));
  m.impl("linear_logprobs_backward", TORCH_BOX(&llava_cot::linear_logprobs_backward));
}
