// Converts the dtype of a tensor to the Dtype of isa.h.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include "cpu/isa.h"

namespace llava_cot {

inline Dtype dtype_of(const torch::stable::Tensor& tensor, const char* name) {
  using torch::headeronly::ScalarType;
  const ScalarType dtype = tensor.scalar_type();
  STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::BFloat16 || dtype == ScalarType::Half, name,
                  " must be float32, bfloat16 or float16");
  if (dtype == ScalarType::Float) return Dtype::FLOAT32;
  return dtype == ScalarType::BFloat16 ? Dtype::BFLOAT16 : Dtype::FLOAT16;
}

inline int64_t size_of(Dtype dtype) { return dtype == Dtype::FLOAT32 ? 4 : 2; }

}  // namespace llava_cot
