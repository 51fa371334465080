// Everything that the kernels use of CUDA beyond the language: launches, counted access to global memory, and teams of
// blocks. tests/fibers has the same for a host build that runs every thread as a fiber; docs/kernels.md lists it.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Exception.h>
#include <torch/headeronly/util/Half.h>

#include <cstdint>

namespace llava_cot {

// The launch of a kernel. Blocks of one team are adjacent in the grid and can read each other's shared memory.
struct Launch {
  int64_t num_blocks;
  int num_threads;         // per block, a multiple of 32
  int64_t shared_bytes = 0;  // per block: all shared memory of a kernel, at shared_memory()
  int team_size = 1;       // num_blocks is a multiple of it
};

constexpr unsigned kFullWarp = 0xffffffffu;

// Calls visit(T{}) with the type of the logits.
template <class Visitor>
void with_type_of(const torch::stable::Tensor& logits, const Visitor& visit) {
  using torch::headeronly::ScalarType;
  switch (logits.scalar_type()) {
    case ScalarType::Float: return visit(float{});
    case ScalarType::BFloat16: return visit(torch::headeronly::BFloat16{});
    case ScalarType::Half: return visit(torch::headeronly::Half{});
    default: STD_TORCH_CHECK(false, "logits must be float32, bfloat16 or float16");
  }
}

}  // namespace llava_cot

#if defined(LLAVA_COT_FIBERS)
#include "fibers.h"
#else

#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/headeronly/util/shim_utils.h>

namespace llava_cot {

// Makes a tensor's device the current one, and its current stream the one that launches go to.
class OnDeviceOf {
 public:
  explicit OnDeviceOf(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class... Parameters, class... Arguments>
  void run(void (*kernel)(Parameters...), const Launch& launch, const Arguments&... arguments) const {
    if (launch.num_blocks == 0) return;
    constexpr int64_t kWithoutAsking = 48 * 1024;
    if (launch.shared_bytes > kWithoutAsking) {
      check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 static_cast<int>(launch.shared_bytes)));
    }
    if (launch.team_size > 8) check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1));
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(launch.team_size), 1, 1};
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(launch.num_blocks));
    config.blockDim = dim3(static_cast<unsigned>(launch.num_threads));
    config.dynamicSmemBytes = static_cast<size_t>(launch.shared_bytes);
    config.stream = stream_;
    config.attrs = &cluster;
    config.numAttrs = launch.team_size > 1;
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...));
  }

 private:
  static void check(cudaError_t error) {
    STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error));
  }

  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

// The limits of a device, which are queried once per device.
struct DeviceLimits {
  int num_multiprocessors = 1;
  int max_team_size = 1;
  int64_t max_shared_bytes = 48 * 1024;  // per block
};

inline DeviceLimits device_limits(const torch::stable::Tensor& tensor) {
  constexpr int kMaxDevices = 64;
  static DeviceLimits of_device[kMaxDevices];
  static bool known[kMaxDevices];
  const int device = tensor.get_device_index();
  const int slot = device % kMaxDevices;
  if (!known[slot]) {
    int multiprocessors = 1, shared_bytes = 48 * 1024, major = 8;
    cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
    cudaDeviceGetAttribute(&shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    of_device[slot] = {multiprocessors, major >= 9 ? 8 : 1, shared_bytes};
    known[slot] = true;
  }
  return of_device[slot];
}

// ---- in kernels ----

template <class T>
__device__ __forceinline__ T load(const T* address) {
  return *address;
}

// Loads from an address that is the same for the whole warp, so it is read once.
template <class T>
__device__ __forceinline__ T load_uniform(const T* address) {
  return *address;
}

template <class T>
__device__ __forceinline__ void store(T* address, const T& value) {
  *address = value;
}

__device__ __forceinline__ char* shared_memory() {
  extern __shared__ __align__(16) char memory[];
  return memory;
}

// 2^x within 2 ulp, by the special function unit; 0 for -inf.
__device__ __forceinline__ float exp2_approximate(float x) {
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
__device__ __forceinline__ int team_rank() { return static_cast<int>(__clusterRelativeBlockRank()); }
__device__ __forceinline__ int team_size() { return static_cast<int>(__clusterSizeInBlocks()); }

// A barrier of all threads of the team; shared memory written before it is seen by the whole team after it.
__device__ __forceinline__ void team_sync() {
  __cluster_barrier_arrive();
  __cluster_barrier_wait();
}

// The address of a peer's shared variable. The team must meet in team_sync() before any of it leaves the kernel.
template <class T>
__device__ __forceinline__ const T* team_peer(const T* shared, int rank) {
  return static_cast<const T*>(__cluster_map_shared_rank(shared, static_cast<unsigned>(rank)));
}
#else  // before sm_90 a team is one block
__device__ __forceinline__ int team_rank() { return 0; }
__device__ __forceinline__ int team_size() { return 1; }
__device__ __forceinline__ void team_sync() { __syncthreads(); }
template <class T>
__device__ __forceinline__ const T* team_peer(const T* shared, int) {
  return shared;
}
#endif

}  // namespace llava_cot
#endif
