// The namespace of the ops. The host build of the CUDA kernels (tests/fibers) registers the same ops again, under a
// different name and for CPU tensors.
#pragma once

#include <torch/csrc/stable/library.h>

#if defined(LLAVA_COT_FIBERS)
#define LLAVA_COT_OPS llava_cot_kernels_fibers
#define LLAVA_COT_CUDA CPU
#else
#define LLAVA_COT_OPS llava_cot_kernels
#define LLAVA_COT_CUDA CUDA
#endif

// One more step of expansion, since the macros of torch paste their arguments.
#define LLAVA_COT_EXPAND(macro, ...) macro(__VA_ARGS__)
#define DEFINE_OPS(m) LLAVA_COT_EXPAND(STABLE_TORCH_LIBRARY, LLAVA_COT_OPS, m)
#define IMPLEMENT_CUDA_OPS(m) LLAVA_COT_EXPAND(STABLE_TORCH_LIBRARY_IMPL, LLAVA_COT_OPS, LLAVA_COT_CUDA, m)
