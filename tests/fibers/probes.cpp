// Small kernels that show what the fibers do: tests/kernels/test_fibers.py runs each by its name.
#include "cuda/device.h"
#include "registration.h"

#include <map>
#include <string>

namespace llava_cot {
namespace {

using torch::stable::Tensor;

constexpr int kTeam = 4;

// out[t] = t + 30 (mod n) after thirty steps round the block, with two barriers each.
__global__ void rotate(int64_t* out) {
  auto* shared = reinterpret_cast<int64_t*>(shared_memory());
  const unsigned n = blockDim.x, t = threadIdx.x;
  int64_t value = t;
  for (int step = 0; step < 30; ++step) {
    shared[t] = value;
    __syncthreads();
    value = shared[(t + 1) % n];
    __syncthreads();
  }
  store(out + t, value);
}

__global__ void race(int64_t* out) {
  auto* shared = reinterpret_cast<int64_t*>(shared_memory());
  shared[threadIdx.x] = threadIdx.x;
  store(out + threadIdx.x, shared[(threadIdx.x + 1) % blockDim.x]);
}

__global__ void two_barriers(int64_t*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    team_sync();
  }
}

__global__ void half_a_warp(int64_t*) {
  if (threadIdx.x % 32 < 16) __ballot_sync(kFullWarp, true);
}

__global__ void two_functions(int64_t*) {
  if (threadIdx.x % 2 == 0) {
    __ballot_sync(kFullWarp, true);
  } else {
    __shfl_sync(kFullWarp, 1, 0);
  }
}

__global__ void overflow(int64_t*) { shared_memory()[blockDim.x * sizeof(int64_t)] = 0; }

__global__ void returns_early(int64_t* out) {
  if (threadIdx.x >= 32) return;
  __syncthreads();
  store(out + threadIdx.x, int64_t{1});
}

__global__ void warp_functions(int64_t* out) {
  const int t = static_cast<int>(threadIdx.x);
  int64_t sum = t;
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(kFullWarp, sum, distance);
  const int up = __shfl_up_sync(kFullWarp, t, 1u), down = __shfl_down_sync(kFullWarp, t, 2u);
  const int third = __shfl_sync(kFullWarp, t, 3);
  const bool votes = __any_sync(kFullWarp, t % 32 == 7) && !__all_sync(kFullWarp, t % 32 == 7);
  store(out + t, ((sum * 64 + up % 64) * 64 + down % 64) * 64 + third % 64 + (votes ? 1 << 30 : 0));
  if (__popc(__ballot_sync(kFullWarp, t % 3 == 0)) < 10) store(out + t, int64_t{-1});
}

// Each thread of block r reads its neighbour's thread in block r + 1.
__global__ void peers(int64_t* out) {
  auto* shared = reinterpret_cast<int64_t*>(shared_memory());
  const int t = static_cast<int>(threadIdx.x);
  shared[t] = team_rank() * 1000 + t;
  team_sync();
  const int64_t seen = *team_peer(shared + t, (team_rank() + 1) % team_size());
  team_sync();
  atomicAdd(out + t, seen);
}

void probe(Tensor out, std::string name) {
  using Kernel = void (*)(int64_t*);
  static const std::map<std::string, Kernel> kernels{
      {"rotate", rotate},       {"race", race},
      {"two_barriers", two_barriers}, {"half_a_warp", half_a_warp},
      {"two_functions", two_functions}, {"overflow", overflow},
      {"returns_early", returns_early}, {"warp_functions", warp_functions},
      {"peers", peers},
  };
  const int num_threads = static_cast<int>(out.numel());
  OnDeviceOf(out).run(kernels.at(name), {kTeam, num_threads, num_threads * 8, kTeam}, out.mutable_data_ptr<int64_t>());
}

}  // namespace

LLAVA_COT_EXPAND(STABLE_TORCH_LIBRARY_FRAGMENT, LLAVA_COT_OPS, m) { m.def("probe(Tensor(a!) out, str name) -> ()"); }
IMPLEMENT_CUDA_OPS(m) { m.impl("probe", TORCH_BOX(&probe)); }

}  // namespace llava_cot
