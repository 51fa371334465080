// Seeded sampling. llava_cot_kernels/sampling.py has the definition, and sample_row.cuh the steps. There is one launch,
// in which a team of blocks takes one candidate. What does not fit in the team's shared memory (V > 390,000 where a
// team has 8 blocks; V > 32,000 before sm_90, where it has one) is read again by each step.
#include "cuda/sample_row.cuh"
#include "registration.h"

namespace llava_cot {
namespace {

using torch::stable::Tensor;

constexpr int64_t kTokensOfBlock = 4096;  // a team is enlarged only while its blocks have more

template <class T, bool kFits>
__global__ void __launch_bounds__(kMaxThreads, 2) sample_kernel(const T* logits, Arguments a) {
  const int64_t n = static_cast<int64_t>(blockIdx.x) / team_size(), row = load_uniform(a.row + n);
  if (row < 0 || row >= a.num_rows) {  // an idle slot, or a bad row that only the status can report
    if (team_rank() == 0 && threadIdx.x == 0) write(a, n, -1, {}, row >= a.num_rows);
    return;
  }
  sample_row<T, kFits>(logits + row * a.row_stride, a, n, *reinterpret_cast<Board*>(shared_memory()));
  team_sync();  // no block may leave while its team reads what it shares
}

// ---- the op ----

// Chooses as few blocks as keep every multiprocessor busy, with slices that leave room for a second block.
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

void sample(const Tensor& logits, const Tensor& row, const Tensor& temperature, const Tensor& top_k,
            const Tensor& top_p, const Tensor& min_p, const Tensor& seed, const Tensor& position,
            const std::optional<Tensor>& tag_table, const std::optional<Tensor>& tag_ends,
            const std::optional<Tensor>& token_bytes, const std::optional<Tensor>& token_offsets, const Tensor& token,
            const Tensor& logprob, const Tensor& entropy, const Tensor& sampling_logprob, const Tensor& tag_state,
            const Tensor& tag, const Tensor& overhang, const Tensor& status) {
  check_logits(logits);
  const Candidates candidates =
      check_candidates(row, temperature, top_k, top_p, min_p, seed, position, token, logprob, entropy, sampling_logprob,
                       tag_state, tag, overhang, status);
  const StageTags tags = check_tags(tag_table, tag_ends, token_bytes, token_offsets);
  const Arguments arguments{candidates, tags, logits.size(0), logits.size(1), logits.stride(0), 0, 0};
  const int64_t n = row.numel();
  with_type_of(logits, [&](auto type) { launch_sample<decltype(type)>(logits, arguments, n); });
}

}  // namespace

IMPLEMENT_CUDA_OPS(m) { m.impl("sample", TORCH_BOX(&sample)); }

}  // namespace llava_cot
