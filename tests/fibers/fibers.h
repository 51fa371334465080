// CUDA on the host, for tests: csrc/cuda/device.h includes this when LLAVA_COT_FIBERS is defined.
//
// Each thread of a team of blocks is a fiber with a stack of its own, and a team runs to its end before the next one
// starts. Fibers switch only where CUDA's threads wait for each other, in an order that a test may change, so that a
// missing barrier shows as another result. Covered: threadIdx.x, blockIdx.x, blockDim.x, gridDim.x, __syncthreads,
// __syncwarp, shuffles and votes of whole warps, atomics, dynamic shared memory (poisoned at the start), team barriers
// and reads of a peer's shared memory. A barrier that not all threads reach, and a warp function that not all lanes
// call, end the run with an error.
#pragma once

#include <torch/headeronly/util/Exception.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

namespace fibers {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};

struct Counters {
  int64_t launches, bytes_read, bytes_written;
};

extern Counters counters;
extern Index thread_index, block_index, block_size, grid_size;  // of the fiber that runs

enum class Call : int { kNone, kSyncWarp, kShuffle, kVote };

void run(const std::function<void()>& kernel, int64_t num_blocks, int num_threads, int64_t shared_bytes, int team_size);
void sync_block();
void sync_team();
// Deposits a lane's value, waits for the warp, and returns all 32.
const uint64_t* exchange(Call call, unsigned mask, uint64_t value);
char* shared_memory(int rank);  // of a block of this team
int rank();
int lane();

template <class T>
uint64_t pack(T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T unpack(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace fibers

#define threadIdx (fibers::thread_index)
#define blockIdx (fibers::block_index)
#define blockDim (fibers::block_size)
#define gridDim (fibers::grid_size)

inline void __syncthreads() { fibers::sync_block(); }
inline void __syncwarp(unsigned mask = 0xffffffffu) { fibers::exchange(fibers::Call::kSyncWarp, mask, 0); }

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return fibers::unpack<T>(fibers::exchange(fibers::Call::kShuffle, mask, fibers::pack(value))[lane & 31]);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return fibers::unpack<T>(
      fibers::exchange(fibers::Call::kShuffle, mask, fibers::pack(value))[(fibers::lane() ^ lane_mask) & 31]);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  const int lane = fibers::lane(), source = lane - static_cast<int>(delta);
  return fibers::unpack<T>(
      fibers::exchange(fibers::Call::kShuffle, mask, fibers::pack(value))[source < 0 ? lane : source]);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta) {
  const int lane = fibers::lane(), source = lane + static_cast<int>(delta);
  return fibers::unpack<T>(
      fibers::exchange(fibers::Call::kShuffle, mask, fibers::pack(value))[source > 31 ? lane : source]);
}
inline unsigned __ballot_sync(unsigned mask, bool predicate) {
  const uint64_t* of_lane = fibers::exchange(fibers::Call::kVote, mask, predicate);
  unsigned ballot = 0;
  for (int lane = 0; lane < 32; ++lane) ballot |= static_cast<unsigned>(of_lane[lane]) << lane;
  return ballot;
}
inline bool __any_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate) != 0; }
inline bool __all_sync(unsigned mask, bool predicate) { return __ballot_sync(mask, predicate) == 0xffffffffu; }

// Fibers switch nowhere inside these, which makes them atomic.
template <class T>
T atomicAdd(T* address, T value) {
  const T before = *address;
  *address = before + value;
  return before;
}
template <class T>
T atomicMax(T* address, T value) {
  const T before = *address;
  *address = before < value ? value : before;
  return before;
}
template <class T>
T atomicMin(T* address, T value) {
  const T before = *address;
  *address = value < before ? value : before;
  return before;
}
template <class T>
T atomicOr(T* address, T value) {
  const T before = *address;
  *address = before | value;
  return before;
}

inline int __popc(unsigned x) { return std::popcount(x); }
inline int __ffs(int x) { return x ? std::countr_zero(static_cast<unsigned>(x)) + 1 : 0; }
inline int __clz(int x) { return std::countl_zero(static_cast<unsigned>(x)); }
inline uint64_t __umul64hi(uint64_t a, uint64_t b) { return static_cast<uint64_t>((unsigned __int128){a} * b >> 64); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline int __float2int_ru(float x) { return static_cast<int>(std::ceil(x)); }

namespace llava_cot {

class OnDeviceOf {
 public:
  explicit OnDeviceOf(const torch::stable::Tensor&) {}

  template <class... Parameters, class... Arguments>
  void run(void (*kernel)(Parameters...), const Launch& launch, const Arguments&... arguments) const {
    if (launch.num_blocks == 0) return;
    fibers::run([&] { kernel(static_cast<Parameters>(arguments)...); }, launch.num_blocks, launch.num_threads,
                launch.shared_bytes, launch.team_size);
  }
};

// Of an H200; a test may set others.
struct DeviceLimits {
  int num_multiprocessors = 132;
  int max_team_size = 8;
  int64_t max_shared_bytes = 227 * 1024;
};

DeviceLimits device_limits(const torch::stable::Tensor&);

template <class T>
T load(const T* address) {
  fibers::counters.bytes_read += sizeof(T);
  return *address;
}
template <class T>
T load_uniform(const T* address) {
  if (fibers::lane() == 0) fibers::counters.bytes_read += sizeof(T);
  return *address;
}
template <class T>
void store(T* address, const T& value) {
  fibers::counters.bytes_written += sizeof(T);
  *address = value;
}

// Exact, which a GPU's is not: what is tested here of its error is tested again where a GPU is at hand.
inline float exp2_approximate(float x) { return std::exp2(x); }
inline char* shared_memory() { return fibers::shared_memory(fibers::rank()); }
inline int team_rank() { return fibers::rank(); }
int team_size();
inline void team_sync() { fibers::sync_team(); }
template <class T>
const T* team_peer(const T* shared, int rank) {
  const auto offset = reinterpret_cast<const char*>(shared) - shared_memory();
  return reinterpret_cast<const T*>(fibers::shared_memory(rank) + offset);
}

}  // namespace llava_cot
