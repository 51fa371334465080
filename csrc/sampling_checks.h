// Checks the tensors of sample and collects them for its two kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "checks.h"
#include "stage_tags.h"

namespace llava_cot {

// One entry for each of N candidates.
struct Candidates {
  const int64_t* row;
  const float* temperature;
  const int64_t* top_k;
  const float *top_p, *min_p;
  const int64_t *seed, *position;
  int64_t* token;
  float *logprob, *entropy, *sampling_logprob;
  int32_t *tag_state, *tag, *overhang, *status;
};

inline Candidates check_candidates(const torch::stable::Tensor& row, const torch::stable::Tensor& temperature,
                                   const torch::stable::Tensor& top_k, const torch::stable::Tensor& top_p,
                                   const torch::stable::Tensor& min_p, const torch::stable::Tensor& seed,
                                   const torch::stable::Tensor& position, const torch::stable::Tensor& token,
                                   const torch::stable::Tensor& logprob, const torch::stable::Tensor& entropy,
                                   const torch::stable::Tensor& sampling_logprob, const torch::stable::Tensor& tag_state,
                                   const torch::stable::Tensor& tag, const torch::stable::Tensor& overhang,
                                   const torch::stable::Tensor& status) {
  const int64_t n = row.numel();
  CHECK_VECTOR(row, n, Long);
  CHECK_VECTOR(temperature, n, Float);
  CHECK_VECTOR(top_k, n, Long);
  CHECK_VECTOR(top_p, n, Float);
  CHECK_VECTOR(min_p, n, Float);
  CHECK_VECTOR(seed, n, Long);
  CHECK_VECTOR(position, n, Long);
  CHECK_VECTOR(token, n, Long);
  CHECK_VECTOR(logprob, n, Float);
  CHECK_VECTOR(entropy, n, Float);
  CHECK_VECTOR(sampling_logprob, n, Float);
  CHECK_VECTOR(tag_state, n, Int);
  CHECK_VECTOR(tag, n, Int);
  CHECK_VECTOR(overhang, n, Int);
  CHECK_VECTOR(status, n, Int);
  return {row.const_data_ptr<int64_t>(),
          temperature.const_data_ptr<float>(),
          top_k.const_data_ptr<int64_t>(),
          top_p.const_data_ptr<float>(),
          min_p.const_data_ptr<float>(),
          seed.const_data_ptr<int64_t>(),
          position.const_data_ptr<int64_t>(),
          token.mutable_data_ptr<int64_t>(),
          logprob.mutable_data_ptr<float>(),
          entropy.mutable_data_ptr<float>(),
          sampling_logprob.mutable_data_ptr<float>(),
          tag_state.mutable_data_ptr<int32_t>(),
          tag.mutable_data_ptr<int32_t>(),
          overhang.mutable_data_ptr<int32_t>(),
          status.mutable_data_ptr<int32_t>()};
}

inline void check_logits(const torch::stable::Tensor& logits) {
  CHECK_DIM(logits, 2);
  const int64_t vocabulary = logits.size(1);
  STD_TORCH_CHECK(vocabulary > 0 && vocabulary < (1 << 23), "logits must have 1 <= V < 2**23, got ", vocabulary);
  STD_TORCH_CHECK(vocabulary == 1 || logits.stride(1) == 1, "logits must have stride 1 in dimension 1");
}

// Without a table there are no tokens, so no tag ever closes.
inline StageTags check_tags(const std::optional<torch::stable::Tensor>& table,
                            const std::optional<torch::stable::Tensor>& ends,
                            const std::optional<torch::stable::Tensor>& bytes,
                            const std::optional<torch::stable::Tensor>& offsets) {
  if (!table) return {};
  STD_TORCH_CHECK(ends && bytes && offsets, "a tag automaton must come with all of its tensors");
  const torch::stable::Tensor &tag_table = *table, &tag_ends = *ends, &token_bytes = *bytes, &token_offsets = *offsets;
  CHECK_DIM(tag_table, 2);
  CHECK_SIZE(tag_table, 1, 256);
  CHECK_DTYPE(tag_table, Int);
  CHECK_CONTIGUOUS(tag_table);
  STD_TORCH_CHECK(tag_table.size(0) > 0, "tag_table must have a start state");
  CHECK_VECTOR(tag_ends, tag_table.size(0), Int);
  CHECK_VECTOR(token_bytes, token_bytes.numel(), Byte);
  CHECK_VECTOR(token_offsets, token_offsets.numel(), Long);
  STD_TORCH_CHECK(token_offsets.size(0) > 0, "token_offsets must have num_tokens + 1 entries, got none");
  return {tag_table.const_data_ptr<int32_t>(),
          tag_ends.const_data_ptr<int32_t>(),
          token_bytes.const_data_ptr<uint8_t>(),
          token_offsets.const_data_ptr<int64_t>(),
          token_offsets.size(0) - 1,
          tag_table.size(0),
          token_bytes.size(0)};
}

}  // namespace llava_cot
