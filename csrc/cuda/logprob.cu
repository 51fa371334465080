// token_logprobs: one block per row, one read of the logits, and a running softmax.
#include "checks.h"
#include "cuda/device.h"
#include "draw.h"
#include "registration.h"

#include <cmath>
#include <limits>

namespace llava_cot {
namespace {

using torch::stable::Tensor;

constexpr int64_t kIgnoreIndex = -100;
constexpr int kThreads = 512;
constexpr int kWarps = kThreads / 32;
constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// The largest of some logits, and the sum of exp(x - max). A NaN makes the sum NaN, never the maximum.
struct Softmax {
  float max = -kInf;
  float sum = 0.0f;

  __device__ void merge(float other_max, float other_sum) {
    const float larger = other_max > max ? other_max : max;
    const float shift = larger == -kInf ? 0.0f : larger;  // -inf - -inf would be NaN
    sum = sum * exp_nonpositive(max - shift) + other_sum * exp_nonpositive(other_max - shift);
    max = larger;
  }

  template <int N>
  __device__ void add(const float (&x)[N]) {
    float largest = x[0];
#pragma unroll
    for (int i = 1; i < N; ++i) largest = x[i] > largest ? x[i] : largest;
    if (!(largest > -kInf)) largest = -kInf;  // also if x[0] is NaN
    const float shift = largest == -kInf ? 0.0f : largest;
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < N; ++i) total += exp_nonpositive(x[i] - shift);
    merge(largest, total);
  }
};

template <class T>
struct alignas(16) Vector {
  static constexpr int kSize = 16 / sizeof(T);
  T of[kSize];
};

// The elements before the first aligned vector of a row, and those after the last, are read one by one.
template <class T>
__device__ Softmax reduce_row(const T* row, int64_t n) {
  constexpr int kSize = Vector<T>::kSize;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(row) / sizeof(T) % kSize);
  const int64_t aligned = (kSize - misaligned) % kSize, head = aligned < n ? aligned : n;
  const int64_t num_vectors = (n - head) / kSize, tail = head + num_vectors * kSize;
  const auto* vectors = reinterpret_cast<const Vector<T>*>(row + head);
  Softmax softmax;
  for (int64_t i = thread; i < num_vectors; i += kThreads) {
    const Vector<T> loaded = load(vectors + i);
    float x[kSize];
#pragma unroll
    for (int j = 0; j < kSize; ++j) x[j] = static_cast<float>(loaded.of[j]);
    softmax.add(x);
  }
  if (thread < head) softmax.add({static_cast<float>(load(row + thread))});
  if (thread < n - tail) softmax.add({static_cast<float>(load(row + tail + thread))});
  return softmax;
}

__device__ void merge_warp(Softmax& softmax) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) {
    const float max = __shfl_xor_sync(kFullWarp, softmax.max, distance);
    softmax.merge(max, __shfl_xor_sync(kFullWarp, softmax.sum, distance));
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    token_logprobs_kernel(const T* logits, int64_t row_stride, int64_t vocab_size, const int64_t* targets,
                          float* logprobs) {
  const int64_t row = blockIdx.x, target = load_uniform(targets + row);
  const int thread = static_cast<int>(threadIdx.x);
  if (target < 0 || target >= vocab_size) {
    if (thread == 0) store(logprobs + row, target == kIgnoreIndex ? 0.0f : kNan);
    return;
  }
  auto* of_warp = reinterpret_cast<Softmax*>(shared_memory());
  Softmax softmax = reduce_row(logits + row * row_stride, vocab_size);
  merge_warp(softmax);
  if (thread % 32 == 0) of_warp[thread / 32] = softmax;
  __syncthreads();
  if (thread >= 32) return;
  softmax = thread < kWarps ? of_warp[thread] : Softmax{};
  merge_warp(softmax);
  if (thread > 0) return;
  const double chosen = static_cast<float>(load(logits + row * row_stride + target));
  store(logprobs + row, static_cast<float>(chosen - softmax.max - log(static_cast<double>(softmax.sum))));
}

void token_logprobs(Tensor logits, Tensor targets, Tensor logprobs) {
  CHECK_DIM(logits, 2);
  const int64_t rows = logits.size(0), vocab_size = logits.size(1);
  CHECK_VECTOR(targets, rows, Long);
  CHECK_VECTOR(logprobs, rows, Float);
  STD_TORCH_CHECK(vocab_size <= 1 || logits.stride(1) == 1, "logits must have stride 1 in dimension 1");
  const OnDeviceOf device(logits);
  with_type_of(logits, [&](auto type) {
    using T = decltype(type);
    device.run(token_logprobs_kernel<T>, {rows, kThreads, kWarps * sizeof(Softmax)}, logits.const_data_ptr<T>(),
               logits.stride(0), vocab_size, targets.const_data_ptr<int64_t>(), logprobs.mutable_data_ptr<float>());
  });
}

}  // namespace

IMPLEMENT_CUDA_OPS(m) { m.impl("token_logprobs", TORCH_BOX(&token_logprobs)); }

}  // namespace llava_cot
