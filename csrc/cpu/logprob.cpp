// Log-probs of given tokens: a running softmax over pieces of the vocabulary, merged in a fixed order.
//   token_logprobs            the logits are in memory: (row, piece) pairs run in parallel
//   linear_logprobs           the logits come tile by tile from ATen's float32 GEMM and never leave the tile; those of
//                             bfloat16, where the CPU multiplies that, from logprob_pairs.cpp
//   linear_logprobs_backward  the same tiles again, from the forward if it had memory for them; turned into the logits'
//                             gradient in place, then two more GEMMs
#include "cpu/logprob.h"

#include <array>

#include "cpu/dtype.h"

namespace llava_cot {
namespace {

// Two passes (maximum, then sum) read a piece: 16 KiB of float32 are still in L1 at the second. The pieces are the
// same for every thread count, and so is the result.
constexpr int64_t kPiece = 4096;
// The size of each buffer: the weight tile as float32, and its gradient. The logits and a partial product are smaller
// at the usual sizes. Small buffers are still in L2 or L3 when the next step reads them. But below 4 MiB (512 tokens at
// H = 2048) the GEMM itself was measured to slow down. A float32 weight is read in place and may take twice that.
constexpr int64_t kTileBytes = 6 << 20;
// Merging a piece costs about as much as reducing this many elements.
constexpr int64_t kMergeCost = 64;

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

// ---- token_logprobs ----

void token_logprobs(Tensor logits, Tensor targets, Tensor logprobs) {
  const FloatRows source(logits, "logits");
  const int64_t rows = logits.size(0), vocab_size = logits.size(1);
  check_row_vector(logprobs, "logprobs", rows);
  const std::vector<int64_t> kept = kept_rows(targets, rows, vocab_size);
  const int64_t num_kept = static_cast<int64_t>(kept.size());
  std::fill_n(logprobs.mutable_data_ptr<float>(), rows, 0.0f);

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

// Makes a float32 matrix over memory that the caller owns. Being new, it has no autograd history.
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
  (void)torch::stable::detail::to<Tensor>(stack[0]);  // frees the returned handle to out
}

struct Tile {
  int64_t row, token;  // the first of the tile, counted in the kept rows and in the vocabulary
  Tensor hidden;       // [rows, H]
  Tensor weight;       // [tokens, H]
  Tensor logits;       // [rows, tokens], before the temperature; the visitor may overwrite them
};

// hidden @ weight.T over the kept rows, a tile at a time: for each vocabulary tile, each row tile. All is float32: a
// bfloat16 GEMM would round the logits before the softmax.
class LogitTiles {
 public:
  LogitTiles(const Linear& linear, Pass pass)
      : kept(linear.kept),
        weight_(linear.weight, "weight"),
        vocab_size_(linear.weight.size(0)),
        hidden_size_(linear.hidden.size(1)),
        stored_(linear.stored),
        restores_(stored_.data && pass == Pass::BACKWARD) {
    const FloatRows source(linear.hidden, "hidden");
    const int64_t bytes = weight_.is_float32() ? 2 * kTileBytes : kTileBytes;
    const int64_t budget = bytes / static_cast<int64_t>(sizeof(float)), width = std::max<int64_t>(1, hidden_size_);
    tile_tokens = std::min(vocab_size_, std::max<int64_t>(16, budget / width));
    tile_rows = std::min(num_kept(), std::max<int64_t>(16, budget / std::max(width, tile_tokens)));
    const bool in_place = source.is_float32() && num_kept() == linear.hidden.size(0);
    hidden_ = in_place ? view_matrix(source.read(0, 0, 0, nullptr), num_kept(), hidden_size_, source.stride())
                       : gather(source);
  }

  int64_t num_kept() const { return static_cast<int64_t>(kept.size()); }

  template <class Visitor>
  void for_each(const Visitor& visit) const {
    if (kept.empty()) return;
    // The gradient may overwrite stored logits of its own tokens, so those of all rows move out of its way.
    const int64_t scratch_rows = restores_ ? num_kept() : stored_.data ? 0 : tile_rows;
    const Tensor scratch = empty_float32(scratch_rows, tile_tokens);
    const Tensor widened = empty_float32(weight_.is_float32() ? 0 : tile_tokens, hidden_size_);
    for (int64_t token = 0; token < vocab_size_; token += tile_tokens) {
      const int64_t num_tokens = std::min(tile_tokens, vocab_size_ - token);
      const Tensor weight = read_weight(token, num_tokens, widened);
      float* logits = scratch.mutable_data_ptr<float>();
      if (restores_) copy(stored_.of_token(token), num_kept() * num_tokens, logits);
      if (stored_.data && !restores_) logits = stored_.of_token(token);
      for (int64_t row = 0; row < num_kept(); row += tile_rows) {
        const int64_t num_rows = std::min(tile_rows, num_kept() - row);
        const float* hidden = hidden_.const_data_ptr<float>() + row * hidden_.stride(0);
        const Tile tile{row, token, view_matrix(hidden, num_rows, hidden_size_, hidden_.stride(0)), weight,
                        view_matrix(logits + (stored_.data ? row * num_tokens : 0), num_rows, num_tokens)};
        if (!restores_) mm_out(tile.hidden, torch::stable::transpose(weight, 0, 1), tile.logits);
        visit(tile);
      }
    }
  }

  const std::vector<int64_t>& kept;
  int64_t tile_rows, tile_tokens;  // the size of a full tile

 private:
  static void copy(const float* source, int64_t n, float* target) {
    parallel_for(0, n, kGrain, [&](int64_t begin, int64_t end) {
      std::copy(source + begin, source + end, target + begin);
    });
  }

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
  const StoredLogits& stored_;
  bool restores_;
  Tensor hidden_;  // float32 [num_kept, H]: the caller's if it can be used as it is, else gathered
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
                     Tensor entropy, std::optional<Tensor> logits) {
  check_linear(hidden, weight, temperature);
  for (Tensor* out : {&logprobs, &lse, &entropy}) {
    check_row_vector(*out, "each output", hidden.size(0));
    std::fill_n(out->mutable_data_ptr<float>(), hidden.size(0), 0.0f);
  }
  const std::vector<int64_t> kept = kept_rows(targets, hidden.size(0), weight.size(0));
  const StoredLogits stored(logits, hidden.size(0), weight.size(0));
  const Linear linear{hidden, weight, kept, targets.const_data_ptr<int64_t>(), static_cast<float>(1 / temperature),
                      stored};
  std::vector<Softmax> softmax(kept.size(), Softmax{1 / temperature});
  std::vector<float> target_logit(kept.size());
  if (has_pairs(hidden)) {
    reduce_pairs(linear, softmax.data(), target_logit.data());
  } else {
    LogitTiles(linear, Pass::FORWARD).for_each([&](const Tile& tile) {
      const int64_t num_tokens = tile.logits.size(1);
      for_each_row(tile, [&](int64_t k, const float* x) {
        const int64_t index = linear.target[kept[k]] - tile.token;
        if (index >= 0 && index < num_tokens) target_logit[k] = x[index];
        for (int64_t col = 0; col < num_tokens; col += kPiece) {
          softmax[k].merge(loops().reduce_piece(x + col, std::min(kPiece, num_tokens - col), linear.scale));
        }
      });
    });
  }
  for (size_t k = 0; k < kept.size(); ++k) {
    logprobs.mutable_data_ptr<float>()[kept[k]] = softmax[k].logprob(target_logit[k]);
    lse.mutable_data_ptr<float>()[kept[k]] = softmax[k].lse();
    entropy.mutable_data_ptr<float>()[kept[k]] = softmax[k].entropy();
  }
}

// ---- linear_logprobs_backward ----

// Float32 sums of a gradient. If the gradient is float32 it is its own sum. Otherwise the sum has memory of its own and
// is cast into place at the end.
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

// hidden_sum [T, H] and weight_sum, of all tokens or of a tile of them (as sums_of), may be null.
void add_gradients(const Linear& linear, const RowStatistics& rows, float* hidden_sum, const Tensor* weight_sum,
                   std::optional<Tensor> grad_weight, const LogitTiles& tiles) {
  const int64_t width = linear.hidden.size(1);
  const bool is_float32 = linear.hidden.scalar_type() == ScalarType::Float;
  Accumulator accumulate;
  tiles.for_each([&](const Tile& tile) {
    const int64_t num_rows = tile.logits.size(0), num_tokens = tile.logits.size(1);
    for_each_row(tile, [&](int64_t k, float* x) {
      const int64_t row = tiles.kept[k], index = linear.target[row] - tile.token;
      const float grad_logprob = rows.grad_logprob[row];
      loops().logits_to_gradient(
          x, num_tokens, {linear.scale, rows.lse[row], rows.entropy[row], grad_logprob, rows.grad_entropy[row]});
      if (index >= 0 && index < num_tokens) x[index] += linear.scale * grad_logprob;
    });
    if (hidden_sum) accumulate(tile.logits, tile.weight, hidden_sum + tile.row * width, tile.token == 0);
    if (!weight_sum) return;
    float* sum = weight_sum->mutable_data_ptr<float>() + (is_float32 ? tile.token * width : 0);
    accumulate(torch::stable::transpose(tile.logits, 0, 1), tile.hidden, sum, tile.row == 0);
    if (is_float32 || tile.row + num_rows < tiles.num_kept()) return;
    Tensor final = torch::stable::narrow(*grad_weight, 0, tile.token, num_tokens);
    torch::stable::copy_(final, view_matrix(sum, num_tokens, width));
  });
}

void linear_logprobs_backward(Tensor grad_logprobs, Tensor grad_entropy, Tensor hidden, Tensor weight, Tensor targets,
                              Tensor lse, Tensor entropy, double temperature, std::optional<Tensor> grad_hidden,
                              std::optional<Tensor> grad_weight, std::optional<Tensor> logits) {
  check_linear(hidden, weight, temperature);
  for (const Tensor* in : {&grad_logprobs, &grad_entropy, &lse, &entropy}) {
    check_row_vector(*in, "each gradient and statistic", hidden.size(0));
  }
  if (grad_hidden) check_gradient(*grad_hidden, hidden, "grad_hidden");
  if (grad_weight) check_gradient(*grad_weight, weight, "grad_weight");
  const std::vector<int64_t> kept = kept_rows(targets, hidden.size(0), weight.size(0));
  if (grad_weight && kept.empty()) torch::stable::zero_(*grad_weight);
  const StoredLogits stored(logits, hidden.size(0), weight.size(0));
  const Linear linear{hidden, weight, kept, targets.const_data_ptr<int64_t>(), static_cast<float>(1 / temperature),
                      stored};
  const RowStatistics rows{lse.const_data_ptr<float>(), entropy.const_data_ptr<float>(),
                           grad_logprobs.const_data_ptr<float>(), grad_entropy.const_data_ptr<float>()};

  std::optional<Tensor> hidden_sum, weight_sum;
  if (grad_hidden) hidden_sum = sums_of(*grad_hidden, hidden.size(0));
  float* hidden_sums = hidden_sum ? hidden_sum->mutable_data_ptr<float>() : nullptr;
  if (has_pairs(hidden)) {
    gradients_of_pairs(linear, rows, hidden_sums,
                       grad_weight ? static_cast<uint16_t*>(grad_weight->mutable_data_ptr()) : nullptr);
  } else {
    const LogitTiles tiles(linear, Pass::BACKWARD);
    if (grad_weight) weight_sum = sums_of(*grad_weight, tiles.tile_tokens);
    add_gradients(linear, rows, hidden_sums, weight_sum ? &*weight_sum : nullptr, grad_weight, tiles);
  }
  if (!grad_hidden) return;
  spread_rows(*hidden_sum, kept);
  if (hidden.scalar_type() != ScalarType::Float) torch::stable::copy_(*grad_hidden, *hidden_sum);
}

}  // namespace
}  // namespace llava_cot

STABLE_TORCH_LIBRARY_IMPL(llava_cot_kernels, CPU, m) {
  m.impl("token_logprobs", TORCH_BOX(&llava_cot::token_logprobs));
  m.impl("linear_logprobs", TORCH_BOX(&llava_cot::linear_logprobs));
  m.impl("linear_logprobs_backward", TORCH_BOX(&llava_cot::linear_logprobs_backward));
}
