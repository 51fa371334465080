// The tag automaton of llava_cot_kernels/stage_tags.py, walked over the bytes of one drawn token.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define LLAVA_COT_HOST_DEVICE __host__ __device__
#else
#define LLAVA_COT_HOST_DEVICE
#endif

namespace llava_cot {

struct StageTags {
  const int32_t* table;          // [num_states, 256] next state
  const int32_t* ends;           // [num_states] tag closed on entering the state, or -1
  const uint8_t* token_bytes;    // [total]
  const int64_t* token_offsets;  // [num_tokens + 1]
  int64_t num_tokens, num_states, num_bytes;
};

struct TagStep {
  int32_t state;
  int32_t tag;       // the first tag closed inside the token, or -1
  int32_t overhang;  // bytes of the token after that tag
};

// Tokens outside [0, num_tokens) are empty: idle slots, and rows of the head that pad the vocabulary. A walk that
// leaves the tables ends there. The CPU rejects such tables beforehand; CUDA could not without waiting.
LLAVA_COT_HOST_DEVICE inline TagStep advance(const StageTags& tags, int32_t state, int64_t token) {
  TagStep step{state, -1, 0};
  if (token < 0 || token >= tags.num_tokens || state < 0 || state >= tags.num_states) return step;
  const int64_t begin = tags.token_offsets[token], end = tags.token_offsets[token + 1];
  if (begin < 0 || end > tags.num_bytes) return step;
  for (int64_t i = begin; i < end; ++i) {
    step.state = tags.table[static_cast<int64_t>(step.state) * 256 + tags.token_bytes[i]];
    if (step.state < 0 || step.state >= tags.num_states) return step;
    if (step.tag < 0 && tags.ends[step.state] >= 0) {
      step.tag = tags.ends[step.state];
      step.overhang = static_cast<int32_t>(end - i - 1);
    }
  }
  return step;
}

}  // namespace llava_cot
