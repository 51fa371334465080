// Code that the log-prob ops share: the running softmax, the kept rows, and checks.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/headeronly/util/shim_utils.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <vector>

#include "checks.h"
#include "cpu/isa.h"

namespace llava_cot {

using torch::headeronly::ScalarType;
using torch::stable::parallel_for;
using torch::stable::Tensor;

constexpr int64_t kIgnoreIndex = -100;
constexpr float kInf = std::numeric_limits<float>::infinity();
// Below so many elements per task, a thread costs more than it saves.
constexpr int64_t kGrain = 32768;

inline int64_t grain(int64_t elements) { return kGrain / std::clamp<int64_t>(elements, 1, kGrain); }

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

inline void check_row_vector(const Tensor& vector, const char* name, int64_t rows, ScalarType dtype = ScalarType::Float) {
  STD_TORCH_CHECK(vector.dim() == 1 && vector.size(0) == rows, name, " must have shape [T=", rows, "]");
  STD_TORCH_CHECK(vector.is_contiguous(), name, " must be contiguous");
  STD_TORCH_CHECK(vector.scalar_type() == dtype, name, " has the wrong dtype");
}

// Returns the rows whose target is a token, in order.
inline std::vector<int64_t> kept_rows(const Tensor& targets, int64_t rows, int64_t vocab_size) {
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

inline Tensor empty_float32(int64_t rows, int64_t cols) {
  return torch::stable::empty({rows, cols}, ScalarType::Float, std::nullopt,
                              torch::stable::Device(torch::headeronly::DeviceType::CPU));
}

// The sum's first rows are the kept ones: spread them out in place, last first (kept[k] >= k), and zero the others.
inline void spread_rows(const Tensor& sum, const std::vector<int64_t>& kept) {
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

inline void check_linear(const Tensor& hidden, const Tensor& weight, double temperature) {
  CHECK_DIM(hidden, 2);
  CHECK_DIM(weight, 2);
  CHECK_SIZE(weight, 1, hidden.size(1));
  STD_TORCH_CHECK(weight.scalar_type() == hidden.scalar_type(), "weight must have the dtype of hidden");
  for (const Tensor* matrix : {&hidden, &weight}) {
    STD_TORCH_CHECK(matrix->size(1) <= 1 || matrix->stride(1) == 1, "hidden and weight must have stride 1 in dimension 1");
  }
  STD_TORCH_CHECK(temperature > 0, "temperature must be > 0, got ", temperature);
}

inline void check_gradient(const Tensor& grad, const Tensor& of, const char* name) {
  STD_TORCH_CHECK(grad.dim() == 2 && grad.size(0) == of.size(0) && grad.size(1) == of.size(1) &&
                      grad.scalar_type() == of.scalar_type() && grad.is_contiguous(),
                  name, " must be contiguous, with the shape and dtype of its tensor");
}

// ---- logits that wait for the backward ----

// The forward may leave the logits in memory that it is given, so that the backward need not compute them again. They
// fill its end, `stride` floats for each token. So it may be the memory of the weight's gradient, if a token's gradient
// is no smaller than its logits: one tile of tokens after the other, the gradient then reaches no logits of later tiles.
struct StoredLogits {
  float* data;  // null if there is no such memory
  int64_t stride;

  StoredLogits(const std::optional<Tensor>& memory, int64_t rows, int64_t vocab_size)
      : data(nullptr), stride(round_up(rows, LANES)) {
    if (!memory) return;
    const int64_t size = memory->numel() * memory->element_size() / static_cast<int64_t>(sizeof(float));
    STD_TORCH_CHECK(memory->is_contiguous(), "logits must be contiguous");
    STD_TORCH_CHECK(size >= vocab_size * stride, "logits must have ", vocab_size * stride * 4, " bytes, got ", size * 4);
    data = static_cast<float*>(memory->mutable_data_ptr()) + size - vocab_size * stride;
  }
  float* of_token(int64_t token) const { return data + token * stride; }
};

enum class Pass { FORWARD, BACKWARD };

// ---- linear_logprobs where one instruction multiplies pairs of bfloat16: logprob_pairs.cpp ----

struct Linear {
  const Tensor &hidden, &weight;
  const std::vector<int64_t>& kept;  // the rows of hidden that have a target, in order
  const int64_t* target;             // one for each row of hidden
  float scale;                       // 1 / temperature
  const StoredLogits& stored;
};

// Results for each row of hidden.
struct RowStatistics {
  const float *lse, *entropy, *grad_logprob, *grad_entropy;
};

bool has_pairs(const Tensor& hidden);

// For the k-th kept row: softmax[k] over all its logits, and the target's logit before the temperature.
void reduce_pairs(const Linear& linear, Softmax* softmax, float* target_logit);

// grad_hidden: float32 [T, H], of which the first rows are stored, one for each that is kept; grad_weight: bfloat16
// [V, H]. Either may be null.
void gradients_of_pairs(const Linear& linear, const RowStatistics& rows, float* grad_hidden, uint16_t* grad_weight);

}  // namespace llava_cot
