// Seeded sampling; llava_cot_kernels/sampling.py has the definition, sample_row.cuh the steps. One launch, in which a
// team of blocks takes one candidate. What does not fit in the team's shared memory (V > 390,000 where a team has 8
// blocks; V > 32,000 before sm_90, where it has one) is read again by each step.
#include <optional>

#include "checks.h"
#include "cuda/sample_row.cuh"
#include "registration.h"

namespace llava_cot {
namespace {

using torch::headeronly::BFloat16;
using torch::headeronly::Half;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kTokensOfBlock = 4096;  // a team grows only while its blocks have more

template <class T, bool kFits>
__global__ void __launch_bounds__(kMaxThreads, 2) sample_kernel(const T* logits, Arguments a) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) / team_size(), row = load_uniform(a.row + n);
  if (row < 0 || row >= a.num_rows) {  // an idle slot, or one that only its status can report
    if (team_rank() == 0 && threadIdx.x == 0) write(a, n, -1, {}, row >= a.num_rows);
    return;
  }
  sample_row<T, kFits>(logits + row * a.row_stride, a, n, *reinterpret_cast<Board*>(shared_memory()));
  team_sync();  // no block may leave while its team reads what it shares
}

// ---- the op ----

// As few blocks as keep every multiprocessor busy, with slices that leave room for a second block beside them.
Launch plan(const DeviceLimits& limits, Arguments& arguments, int64_t num_candidates) {
  Launch launch{num_candidates, 256};
  const int64_t vocabulary = arguments.vocabulary, item = sizeof(float);
  const auto slice_of = [&](int team_size) {
    const int64_t step = launch.num_threads / kWarp * kStep, share = (vocabulary - 1) / team_size + 1;
    return ((share - 1) / step + 1) * step;
  };
  const auto is_worth_splitting = [&](int team_size) {
    const int64_t bytes = static_cast<int64_t>(sizeof(Board)) + slice_of(team_size) * item;
    return vocabulary > kTokensOfBlock * team_size &&
           (num_candidates * team_size < limits.num_multiprocessors || bytes > limits.max_shared_bytes / 2);
  };
  while (launch.team_size < limits.max_team_size && is_worth_splitting(launch.team_size)) launch.team_size *= 2;
  if (slice_of(launch.team_size) > kTokensOfBlock) launch.num_threads = kMaxThreads;
  const int64_t slice = slice_of(launch.team_size);
  const int64_t room = (limits.max_shared_bytes - static_cast<int64_t>(sizeof(Board))) / item / kStep * kStep;
  arguments.slice = static_cast<int>(slice);
  arguments.num_cached = static_cast<int>(slice < room ? slice : room);
  launch.num_blocks = num_candidates * launch.team_size;
  launch.shared_bytes = static_cast<int64_t>(sizeof(Board)) + arguments.num_cached * item;
  return launch;
}

template <class T>
void launch_sample(const Tensor& logits, Arguments arguments, int64_t num_candidates) {
  const OnDeviceOf device(logits);
  const Launch launch = plan(device_limits(logits), arguments, num_candidates);
  const auto kernel = arguments.num_cached == arguments.slice ? sample_kernel<T, true> : sample_kernel<T, false>;
  device.run(kernel, launch, logits.const_data_ptr<T>(), arguments);
}

#define CHECK_VECTOR(tensor, expected, dtype) \
  CHECK_DIM(tensor, 1);                       \
  CHECK_SIZE(tensor, 0, expected);            \
  CHECK_DTYPE(tensor, dtype);                 \
  CHECK_CONTIGUOUS(tensor)

StageTags check_tags(const Tensor& tag_table, const Tensor& tag_ends, const Tensor& token_bytes,
                     const Tensor& token_offsets) {
  CHECK_DIM(tag_table, 2);
  CHECK_SIZE(tag_table, 1, 256);
  CHECK_DTYPE(tag_table, Int);
  CHECK_CONTIGUOUS(tag_table);
  STD_TORCH_CHECK(tag_table.size(0) > 0, "tag_table must have a start state");
  CHECK_VECTOR(tag_ends, tag_table.size(0), Int);
  CHECK_VECTOR(token_bytes, token_bytes.numel(), Byte);
  CHECK_VECTOR(token_offsets, token_offsets.numel(), Long);
  STD_TORCH_CHECK(token_offsets.size(0) > 0, "token_offsets must have num_tokens + 1 entries, got none");
  return {tag_table.const_data_ptr<int32_t>(), tag_ends.const_data_ptr<int32_t>(),
          token_bytes.const_data_ptr<uint8_t>(), token_offsets.const_data_ptr<int64_t>(),
          token_offsets.size(0) - 1, tag_table.size(0), token_bytes.size(0)};
}

void sample(const Tensor& logits, const Tensor& row, const Tensor& temperature, const Tensor& top_k,
            const Tensor& top_p, const Tensor& min_p, const Tensor& seed, const Tensor& position,
            const std::optional<Tensor>& tag_table, const std::optional<Tensor>& tag_ends,
            const std::optional<Tensor>& token_bytes, const std::optional<Tensor>& token_offsets, const Tensor& token,
            const Tensor& logprob, const Tensor& sampling_logprob, const Tensor& entropy, const Tensor& tag_state,
            const Tensor& tag, const Tensor& overhang, const Tensor& status) {
  CHECK_DIM(logits, 2);
  const int64_t vocabulary = logits.size(1), n = row.numel();
  STD_TORCH_CHECK(vocabulary > 0 && vocabulary < (1 << 23), "logits must have 1 <= V < 2**23, got ", vocabulary);
  STD_TORCH_CHECK(vocabulary == 1 || logits.stride(1) == 1, "logits must have stride 1 in dimension 1");
  CHECK_VECTOR(row, n, Long);
  CHECK_VECTOR(temperature, n, Float);
  CHECK_VECTOR(top_k, n, Long);
  CHECK_VECTOR(top_p, n, Float);
  CHECK_VECTOR(min_p, n, Float);
  CHECK_VECTOR(seed, n, Long);
  CHECK_VECTOR(position, n, Long);
  CHECK_VECTOR(token, n, Long);
  CHECK_VECTOR(logprob, n, Float);
  CHECK_VECTOR(sampling_logprob, n, Float);
  CHECK_VECTOR(entropy, n, Float);
  CHECK_VECTOR(tag_state, n, Int);
  CHECK_VECTOR(tag, n, Int);
  CHECK_VECTOR(overhang, n, Int);
  CHECK_VECTOR(status, n, Int);
  StageTags tags{};
  if (tag_table) {
    STD_TORCH_CHECK(tag_ends && token_bytes && token_offsets, "a tag automaton must come with all of its tensors");
    tags = check_tags(*tag_table, *tag_ends, *token_bytes, *token_offsets);
  }
  const Arguments arguments{logits.size(0), vocabulary, logits.stride(0), row.const_data_ptr<int64_t>(),
                            temperature.const_data_ptr<float>(), top_k.const_data_ptr<int64_t>(),
                            top_p.const_data_ptr<float>(), min_p.const_data_ptr<float>(),
                            seed.const_data_ptr<int64_t>(), position.const_data_ptr<int64_t>(),
                            tag_table.has_value(), tags, token.mutable_data_ptr<int64_t>(),
                            logprob.mutable_data_ptr<float>(), sampling_logprob.mutable_data_ptr<float>(),
                            entropy.mutable_data_ptr<float>(), tag_state.mutable_data_ptr<int32_t>(),
                            tag.mutable_data_ptr<int32_t>(), overhang.mutable_data_ptr<int32_t>(),
                            status.mutable_data_ptr<int32_t>(), 0, 0};
  switch (logits.scalar_type()) {
    case ScalarType::Float: return launch_sample<float>(logits, arguments, n);
    case ScalarType::BFloat16: return launch_sample<BFloat16>(logits, arguments, n);
    case ScalarType::Half: return launch_sample<Half>(logits, arguments, n);
    default: STD_TORCH_CHECK(false, "logits must be float32, bfloat16 or float16");
  }
}

}  // namespace

IMPLEMENT_CUDA_OPS(m) { m.impl("sample", TORCH_BOX(&sample)); }

}  // namespace llava_cot
