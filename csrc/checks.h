// Checks that memory safety needs. The public Python functions check the same first, with messages for the user.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#define CHECK_CONTIGUOUS(tensor) STD_TORCH_CHECK((tensor).is_contiguous(), #tensor " must be contiguous")

#define CHECK_DIM(tensor, expected) \
  STD_TORCH_CHECK((tensor).dim() == (expected), #tensor " must have ", (expected), " dimensions, got ", (tensor).dim())

#define CHECK_SIZE(tensor, axis, expected)                                                                       \
  STD_TORCH_CHECK((tensor).size(axis) == (expected), #tensor " must have size ", (expected), " in dimension ", \
                  (axis), ", got ", (tensor).size(axis))

#define CHECK_DTYPE(tensor, expected) \
  STD_TORCH_CHECK((tensor).scalar_type() == torch::headeronly::ScalarType::expected, #tensor " must be " #expected)

#define CHECK_VECTOR(tensor, expected, dtype) \
  CHECK_DIM(tensor, 1);                       \
  CHECK_SIZE(tensor, 0, expected);            \
  CHECK_DTYPE(tensor, dtype);                 \
  CHECK_CONTIGUOUS(tensor)
