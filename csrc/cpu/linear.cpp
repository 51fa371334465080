// few_row_linear: the product of a few rows with a weight of any size, which is read once and in order. Chunks of the
// weight's rows run in parallel.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <optional>
#include <vector>

#include "checks.h"
#include "cpu/dtype.h"
#include "cpu/isa.h"

namespace llava_cot {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChunk = 64;       // rows of the weight
constexpr int64_t kGrain = 1 << 18;  // multiply-adds below which a thread costs more than it saves

// The rows as the loops read them: float32, or bfloat16 where that is multiplied; with zeros up to whole steps.
class PaddedRows {
 public:
  PaddedRows(const Tensor& x, bool as_pairs)
      : stride_(round_up(x.size(1), FEW_ROWS_STEP) * (as_pairs ? 2 : 4)) {
    const int64_t num_rows = x.size(0), depth = x.size(1);
    const Dtype dtype = dtype_of(x, "x");
    const char* source = static_cast<const char*>(x.const_data_ptr());
    const int64_t source_stride = x.stride(0) * size_of(dtype);
    if ((as_pairs || dtype == Dtype::FLOAT32) && (stride_ == source_stride || num_rows == 1) &&
        depth % FEW_ROWS_STEP == 0) {
      data_ = source;
      return;
    }
    static thread_local std::vector<float> buffer;
    buffer.assign(num_rows * stride_ / sizeof(float), 0.0f);
    for (int64_t row = 0; row < num_rows; ++row) {
      char* target = reinterpret_cast<char*>(buffer.data()) + row * stride_;
      if (as_pairs) {
        std::copy_n(source + row * source_stride, depth * 2, target);
      } else {
        loops().widen(dtype, source + row * source_stride, depth, reinterpret_cast<float*>(target));
      }
    }
    data_ = reinterpret_cast<const char*>(buffer.data());
  }

  const char* data() const { return data_; }
  int64_t stride() const { return stride_; }

 private:
  int64_t stride_;
  const char* data_;
};

Weight kind_of(const Tensor& weight) {
  if (weight.scalar_type() == ScalarType::Char) return Weight::INT8;
  switch (dtype_of(weight, "weight")) {
    case Dtype::BFLOAT16: return Weight::BFLOAT16;
    case Dtype::FLOAT16: return Weight::FLOAT16;
    default: return Weight::FLOAT32;
  }
}

std::vector<float> widened(const std::optional<Tensor>& vector, const char* name, int64_t size) {
  if (!vector) return {};
  STD_TORCH_CHECK(vector->dim() == 1 && vector->size(0) == size && vector->is_contiguous(), name,
                  " must be contiguous, of shape [N=", size, "]");
  std::vector<float> values(size);
  loops().widen(dtype_of(*vector, name), vector->const_data_ptr(), size, values.data());
  return values;
}

void few_row_linear(Tensor x, Tensor weight, std::optional<Tensor> scale, std::optional<Tensor> bias, Tensor out) {
  CHECK_DIM(x, 2);
  CHECK_DIM(weight, 2);
  CHECK_DIM(out, 2);
  const int64_t num_x_rows = x.size(0), num_rows = weight.size(0), depth = x.size(1);
  CHECK_SIZE(weight, 1, depth);
  CHECK_SIZE(out, 0, num_x_rows);
  CHECK_SIZE(out, 1, num_rows);
  CHECK_CONTIGUOUS(out);
  for (const Tensor* matrix : {&x, &weight}) {
    STD_TORCH_CHECK(depth <= 1 || matrix->stride(1) == 1, "x and weight must have stride 1 in dimension 1");
  }
  const Weight kind = kind_of(weight);
  STD_TORCH_CHECK(scale.has_value() == (kind == Weight::INT8), "scale must be there for a weight of int8, and only then");
  STD_TORCH_CHECK(kind == Weight::INT8 || weight.scalar_type() == x.scalar_type(), "weight must have the dtype of x");
  STD_TORCH_CHECK(out.scalar_type() == x.scalar_type(), "out must have the dtype of x");
  if (num_x_rows == 0 || num_rows == 0) return;

  const bool as_pairs = kind == Weight::BFLOAT16 && loops().pairs;
  const PaddedRows rows(x, as_pairs);
  const auto multiply = as_pairs ? loops().pairs->multiply_few : loops().multiply_few;
  const std::vector<float> scales = widened(scale, "scale", num_rows), biases = widened(bias, "bias", num_rows);
  const Dtype dtype = dtype_of(out, "out");
  const char* first = static_cast<const char*>(weight.const_data_ptr());
  const int64_t weight_stride = weight.stride(0) * (kind == Weight::INT8 ? 1 : size_of(dtype));
  void* target = out.mutable_data_ptr();

  const int64_t per_chunk = kChunk * num_x_rows * std::max<int64_t>(depth, 1);
  torch::stable::parallel_for(0, ceil_div(num_rows, kChunk), ceil_div(kGrain, per_chunk), [&](int64_t begin, int64_t end) {
    static thread_local std::vector<float> products;
    products.resize(num_x_rows * kChunk);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t n = chunk * kChunk, count = std::min(kChunk, num_rows - n);
      multiply({kind, rows.data(), rows.stride(), first + n * weight_stride, weight_stride, num_x_rows, count, depth,
                products.data(), kChunk});
      for (int64_t m = 0; m < num_x_rows; ++m) {
        float* product = products.data() + m * kChunk;
        for (int64_t i = 0; i < count && scale; ++i) product[i] *= scales[n + i];
        for (int64_t i = 0; i < count && bias; ++i) product[i] += biases[n + i];
        narrow(dtype, product, count, target, m * num_rows + n);
      }
    }
  });
}

}  // namespace
}  // namespace llava_cot

STABLE_TORCH_LIBRARY_IMPL(llava_cot_kernels, CPU, m) {
  m.impl("few_row_linear", TORCH_BOX(&llava_cot::few_row_linear));
}
