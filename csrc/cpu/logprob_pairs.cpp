// linear_logprobs of bfloat16 where one instruction multiplies pairs of them (pair_loops.h): a tile of tokens at a
// time,   logits.T [tokens, rows] = weight @ hidden.T           pairs along H: the weight is read in place
//   their running softmax, or their gradient in place     sixteen rows side by side
//   grad_weight [tokens, H] = gradient.T @ hidden         pairs along rows
//   grad_hidden [rows, H]  += gradient @ weight           pairs along tokens
// Products are exact and sums are float32. As in plain PyTorch, the gradient of the logits is rounded to bfloat16
// before it is multiplied. Every sum has a fixed order for any number of threads.
#include "cpu/logprob.h"

namespace llava_cot {
namespace {

// A tile has about as many tokens as fill these sizes with float32 logits and with pairs of the weight. A tile is read
// from the caches three times, and each tile reads and writes the sums for grad_hidden.
constexpr int64_t kLogitBytes = 2 << 20, kWeightBytes = 4 << 20;
constexpr int64_t kReduced = 256;  // tokens that one float32 sum runs over

// 64-byte aligned memory from the allocator of tensors.
template <class T>
class Buffer {
 public:
  explicit Buffer(int64_t size) : floats_(empty_float32(1, ceil_div(size * static_cast<int64_t>(sizeof(T)), 4))) {}
  T* data() const { return static_cast<T*>(floats_.mutable_data_ptr()); }

 private:
  Tensor floats_;
};

const uint16_t* row_of(const Tensor& matrix, int64_t row) {
  return static_cast<const uint16_t*>(matrix.const_data_ptr()) + row * matrix.stride(0);
}

// The right side of a product: pairs along the summed dimension, in panels of columns, padded with 0.
struct Panels {
  int64_t num_columns, num_pairs;
  Buffer<uint32_t> pairs{ceil_div(num_columns, PANEL) * num_pairs * PANEL};

  uint32_t* panel(int64_t index) const { return pairs.data() + index * num_pairs * PANEL; }
};

// The columns are the given rows. Sums run over their elements.
void fill_from_columns(const Panels& panels, const Tensor& matrix, const std::vector<int64_t>& columns) {
  parallel_for(0, ceil_div(panels.num_columns, PANEL), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      for (int64_t column = 0; column < PANEL; ++column) {
        const int64_t index = p * PANEL + column;
        const bool is_one = index < static_cast<int64_t>(columns.size());
        const uint16_t* x = is_one ? row_of(matrix, columns[index]) : nullptr;
        uint32_t* out = panels.panel(p) + column;
        for (int64_t k = 0; k < panels.num_pairs; ++k) {
          out[k * PANEL] = is_one ? x[2 * k] | static_cast<uint32_t>(x[2 * k + 1]) << 16 : 0;
        }
      }
    }
  });
}

// The columns are the elements of a row. Sums run over the rows row_at(0) to row_at(num_rows - 1).
template <class RowAt>
void fill_from_rows(const Panels& panels, int64_t num_rows, const RowAt& row_at) {
  const std::vector<uint16_t> zeros(panels.num_columns);
  parallel_for(0, ceil_div(num_rows, 2), grain(2 * panels.num_columns), [&](int64_t begin, int64_t end) {
    for (int64_t k = begin; k < end; ++k) {
      const uint16_t* low = row_at(2 * k);
      const uint16_t* high = 2 * k + 1 < num_rows ? row_at(2 * k + 1) : zeros.data();
      for (int64_t first = 0; first < panels.num_columns; first += PANEL) {
        const int64_t n = std::min(PANEL, panels.num_columns - first);
        loops().pairs->interleave(low + first, high + first, n, panels.panel(first / PANEL) + k * PANEL);
      }
    }
  });
}

// left [num_rows][num_pairs], strides in bytes as in PairProduct, times all panels.
struct Product {
  const void* left;
  int64_t row_stride, pair_stride, num_rows;
  Sum how;
  void* out;  // [num_rows][num_columns]
  int64_t out_stride;
};

void multiply(const Product& p, const Panels& panels) {
  const int64_t out_bytes = p.how == Sum::STORE_BFLOAT16 ? 2 : 4;
  const int64_t vectors = PRODUCT_ROWS * panels.num_pairs * ceil_div(panels.num_columns, LANES);
  parallel_for(0, ceil_div(p.num_rows, PRODUCT_ROWS), grain(vectors), [&](int64_t begin, int64_t end) {
    const int64_t row = begin * PRODUCT_ROWS, num_rows = std::min(end * PRODUCT_ROWS, p.num_rows) - row;
    for (int64_t first = 0; first < panels.num_columns; first += PANEL) {
      loops().pairs->multiply({static_cast<const char*>(p.left) + row * p.row_stride, p.row_stride, p.pair_stride,
                               panels.panel(first / PANEL), num_rows, std::min(PANEL, panels.num_columns - first),
                               panels.num_pairs, p.how,
                               static_cast<char*>(p.out) + (row * p.out_stride + first) * out_bytes, p.out_stride});
    }
  });
}

// ---- tiles of tokens ----

// Transposed: [tokens][stride], one column for each kept row and zeros up to the stride.
class LogitTiles {
 public:
  LogitTiles(const Linear& linear, Pass pass)
      : stride(round_up(static_cast<int64_t>(linear.kept.size()), LANES)),
        linear_(linear),
        restores_(linear.stored.data && pass == Pass::BACKWARD),
        hidden_{restores_ ? 0 : stride, linear.hidden.size(1) / 2},
        max_tokens_(tokens_of_tile(linear, stride)),
        scratch_(linear.stored.data ? 0 : max_tokens_ * stride) {
    if (!restores_) fill_from_columns(hidden_, linear.hidden, linear.kept);
  }

  int64_t max_tokens() const { return max_tokens_; }

  // visit(first token, number of tokens, their logits) for each tile
  template <class Visitor>
  void for_each(const Visitor& visit) const {
    const int64_t vocab_size = linear_.weight.size(0);
    for (int64_t token = 0; token < vocab_size; token += max_tokens_) {
      const int64_t num_tokens = std::min(max_tokens_, vocab_size - token), row_stride = linear_.weight.stride(0) * 2;
      float* logits = linear_.stored.data ? linear_.stored.of_token(token) : scratch_.data();
      if (!restores_) {
        multiply({row_of(linear_.weight, token), row_stride, 4, num_tokens, Sum::STORE, logits, stride}, hidden_);
      }
      visit(token, num_tokens, logits);
    }
  }

  const int64_t stride;

 private:
  static int64_t tokens_of_tile(const Linear& linear, int64_t stride) {
    const int64_t by_logits = kLogitBytes / (4 * stride);
    const int64_t by_weight = kWeightBytes / (2 * std::max<int64_t>(1, linear.hidden.size(1)));
    const int64_t step = 8 * PRODUCT_ROWS;  // even, and whole blocks of rows
    return std::min(round_up(std::min(by_logits, by_weight), step), round_up(linear.weight.size(0), 2));
  }

  const Linear& linear_;
  bool restores_;
  Panels hidden_;
  int64_t max_tokens_;
  Buffer<float> scratch_;
};

template <class Visitor>
void for_each_sixteen_rows(const Linear& linear, int64_t num_tokens, const Visitor& visit) {
  const int64_t num_rows = static_cast<int64_t>(linear.kept.size());
  parallel_for(0, ceil_div(num_rows, LANES), grain(num_tokens), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) visit(i * LANES, std::min<int64_t>(LANES, num_rows - i * LANES));
  });
}

}  // namespace

bool has_pairs(const Tensor& hidden) {
  return loops().pairs && hidden.scalar_type() == ScalarType::BFloat16 && hidden.size(1) % 2 == 0;
}

void reduce_pairs(const Linear& linear, Softmax* softmax, float* target_logit) {
  if (linear.kept.empty()) return;
  const LogitTiles tiles(linear, Pass::FORWARD);
  tiles.for_each([&](int64_t token, int64_t num_tokens, const float* logits) {
    for_each_sixteen_rows(linear, num_tokens, [&](int64_t first, int64_t num_rows) {
      for (int64_t t = 0; t < num_tokens; t += kReduced) {
        Piece pieces[LANES];
        const int64_t count = std::min(kReduced, num_tokens - t);
        loops().pairs->reduce({logits + t * tiles.stride + first, count, tiles.stride, linear.scale}, pieces);
        for (int64_t i = 0; i < num_rows; ++i) softmax[first + i].merge(pieces[i]);
      }
      for (int64_t k = first; k < first + num_rows; ++k) {
        const int64_t index = linear.target[linear.kept[k]] - token;
        if (index >= 0 && index < num_tokens) target_logit[k] = logits[index * tiles.stride + k];
      }
    });
  });
}

void gradients_of_pairs(const Linear& linear, const RowStatistics& rows, float* grad_hidden, uint16_t* grad_weight) {
  if (linear.kept.empty()) return;
  const int64_t num_rows = static_cast<int64_t>(linear.kept.size()), width = linear.hidden.size(1);
  const LogitTiles tiles(linear, Pass::BACKWARD);
  const Panels hidden{grad_weight ? width : 0, ceil_div(num_rows, 2)};
  fill_from_rows(hidden, grad_weight ? num_rows : 0, [&](int64_t k) { return row_of(linear.hidden, linear.kept[k]); });
  const int64_t stride = tiles.stride;
  const Buffer<uint16_t> by_row(tiles.max_tokens() * stride);
  const Buffer<uint32_t> by_pair(tiles.max_tokens() / 2 * stride);
  const Panels full_weight{grad_hidden ? width : 0, tiles.max_tokens() / 2};

  tiles.for_each([&](int64_t token, int64_t num_tokens, const float* logits) {
    for_each_sixteen_rows(linear, num_tokens, [&](int64_t first, int64_t num_lanes) {
      ColumnGradient of{};
      for (int64_t i = 0; i < num_lanes; ++i) {
        const int64_t row = linear.kept[first + i], index = linear.target[row] - token;
        of.lse[i] = rows.lse[row];
        of.entropy[i] = rows.entropy[row];
        of.grad_logprob[i] = rows.grad_logprob[row];
        of.grad_entropy[i] = rows.grad_entropy[row];
        of.target[i] = index >= 0 && index < num_tokens ? static_cast<int32_t>(index) : -1;
      }
      loops().pairs->to_gradient({logits + first, num_tokens, stride, linear.scale}, of, by_row.data() + first,
                                 by_pair.data() + first);
    });
    if (grad_weight) {
      multiply({by_row.data(), 2 * stride, 4, num_tokens, Sum::STORE_BFLOAT16, grad_weight + token * width, width},
               hidden);
    }
    if (grad_hidden) {
      const Panels weight{width, ceil_div(num_tokens, 2), full_weight.pairs};
      fill_from_rows(weight, num_tokens, [&](int64_t t) { return row_of(linear.weight, token + t); });
      multiply({by_pair.data(), 4, 4 * stride, num_rows, token == 0 ? Sum::STORE : Sum::ADD, grad_hidden, width},
               weight);
    }
  });
}

}  // namespace llava_cot
