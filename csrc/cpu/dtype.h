// The dtype of a tensor as the Dtype of isa.h, and rounding to it.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

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

// Rounds `size` values into target[offset, ...).
inline void narrow(Dtype dtype, const float* source, int64_t size, void* target, int64_t offset) {
  if (dtype == Dtype::BFLOAT16) {
    std::copy_n(source, size, static_cast<torch::headeronly::BFloat16*>(target) + offset);
  } else if (dtype == Dtype::FLOAT16) {
    std::copy_n(source, size, static_cast<torch::headeronly::Half*>(target) + offset);
  } else {
    std::copy_n(source, size, static_cast<float*>(target) + offset);
  }
}

}  // namespace llava_cot
