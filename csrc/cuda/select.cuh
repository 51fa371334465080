// The threshold of a filter, without sorting. A histogram over the keys of the row finds the bin in which the sum over
// ascending keys crosses what the filter needs; further ones split that bin until one key is left. Sums are integers,
// so that neither the order of the atomics nor the size of the team shows in the result.
#pragma once

#include "cuda/device.h"
#include "draw.h"

namespace llava_cot {

constexpr int kWarp = 32;
constexpr int kBins = 1024;  // bins of one histogram: each lane of a warp has a group of 32
constexpr uint32_t kNoLimit = 0xffffffffu;
constexpr uint32_t kLastKey = 0x7f800000u;  // the key of -inf

struct alignas(16) Quad {  // four consecutive tokens, which a lane handles at a time
  float of[4];
};

// ---- warps and teams ----

__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_index() { return static_cast<int>(threadIdx.x) / kWarp; }

// Reduces the values of all lanes. The result of the operation must not depend on their order.
template <class T, class Operation>
__device__ __forceinline__ T reduce_warp(T value, const Operation& operation) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) {
    value = operation(value, __shfl_xor_sync(kFullWarp, value, offset));
  }
  return value;
}

template <class T>
__device__ __forceinline__ T larger(T a, T b) {
  return a < b ? b : a;
}

template <class T>
__device__ __forceinline__ T smaller(T a, T b) {
  return b < a ? b : a;
}

__device__ __forceinline__ uint64_t sum_warp(uint64_t value) {
  return reduce_warp(value, [](uint64_t a, uint64_t b) { return a + b; });
}

struct Crossing {
  int lane;
  uint64_t before;  // sum of the lanes before it
};

// Returns the first lane at which reached(sum of the lanes up to it) holds, or the last lane if there is none.
template <class Reached>
__device__ __forceinline__ Crossing find_crossing(uint64_t value, const Reached& reached) {
  uint64_t sum = value;
#pragma unroll
  for (int offset = 1; offset < kWarp; offset *= 2) {
    const uint64_t before = __shfl_up_sync(kFullWarp, sum, offset);
    if (lane_index() >= offset) sum += before;
  }
  const unsigned after = __ballot_sync(kFullWarp, reached(sum));
  const int lane = after ? __ffs(static_cast<int>(after)) - 1 : kWarp - 1;
  return {lane, __shfl_sync(kFullWarp, sum - value, lane)};
}

// A 64-bit sum in shared memory. CUDA's own 64-bit atomics there are loops around a compare-and-swap, which are slow
// under contention; 32-bit ones are not. Exactly one addition sees the carry.
struct alignas(8) Sum {
  uint32_t low, high;

  __device__ uint64_t value() const { return static_cast<uint64_t>(high) << 32 | low; }

  __device__ void add(uint64_t amount) {
    const auto addend = static_cast<uint32_t>(amount);
    const uint32_t carry = atomicAdd(&low, addend) + addend < addend;
    const uint32_t rest = static_cast<uint32_t>(amount >> 32) + carry;
    if (rest) atomicAdd(&high, rest);
  }
};

__device__ __forceinline__ uint64_t value_of(const Sum& sum) { return sum.value(); }
__device__ __forceinline__ uint64_t value_of(uint64_t sum) { return sum; }

// Reduces over the blocks of the team.
template <class T>
__device__ __forceinline__ uint64_t sum_team(const T* shared) {
  uint64_t sum = 0;
  for (int rank = 0; rank < team_size(); ++rank) sum += value_of(*team_peer(shared, rank));
  return sum;
}

// ---- the selection ----

struct Filter {
  bool by_mass;  // whether to sum masses; otherwise count tokens
  float amount;  // what is needed: a share of all mass, or a number of tokens (below 2^23, so exact)
};

struct Histogram {
  Sum bin[kBins];
  uint32_t lowest[kBins], highest[kBins];  // keys in the bin; the first histogram does not record them
  uint64_t group[kWarp];                   // sums of 32 bins
};

// Lies in shared memory. The team reads one histogram while its blocks fill the other.
struct Selection {
  Histogram histogram[2];
  int current;           // the histogram to fill next, which is clear
  uint32_t first, last;  // the range of keys that has the threshold
  uint64_t below;        // the sum of the keys before them
  double needed;
};

__device__ __forceinline__ void clear(Histogram& histogram) {
#pragma unroll 1
  for (int bin = static_cast<int>(threadIdx.x); bin < kBins; bin += static_cast<int>(blockDim.x)) {
    histogram.bin[bin] = {0, 0};
    histogram.lowest[bin] = kNoLimit;
    histogram.highest[bin] = 0;
  }
}

// Returns the bin of the first histogram. Bin 0 has only x = 0, where peaked and flat rows end; others are 1/32 wide.
__device__ __forceinline__ int first_bin(float x) { return __float2int_ru(fminf(x * -32.0f, kBins - 1)); }

// Adds four tokens of each lane. If all lanes hit one bin, as ties do, they add their sum once.
__device__ __forceinline__ void add_to_bins(Sum* bins, const int (&bin)[4], const uint64_t (&amount)[4]) {
  int some_bin = -1;
#pragma unroll
  for (int i = 0; i < 4; ++i) some_bin = amount[i] ? bin[i] : some_bin;
  const unsigned adding = __ballot_sync(kFullWarp, some_bin >= 0);
  if (!adding) return;
  const int the_bin = __shfl_sync(kFullWarp, some_bin, __ffs(static_cast<int>(adding)) - 1);
  bool is_alone = true;
#pragma unroll
  for (int i = 0; i < 4; ++i) is_alone &= amount[i] == 0 || bin[i] == the_bin;
  if (__all_sync(kFullWarp, is_alone)) {
    const uint64_t sum = sum_warp(amount[0] + amount[1] + amount[2] + amount[3]);
    if (lane_index() == 0) bins[the_bin].add(sum);
    return;
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    if (amount[i]) bins[bin[i]].add(amount[i]);
  }
}

// One warp finds the bin of the team's histogram in which the sum crosses what is needed.
__device__ __forceinline__ int crossing_bin(Selection& selection, const Histogram& histogram, const Filter& filter,
                                            bool is_first) {
  const uint64_t group_sum = sum_team(histogram.group + lane_index());
  const uint64_t total = sum_warp(group_sum);
  const double amount = filter.amount, whole = filter.by_mass ? amount * static_cast<double>(total) : amount;
  const double needed = is_first ? whole : selection.needed;
  const uint64_t below = is_first ? 0 : selection.below;
  const auto reaches = [&](uint64_t sum) { return static_cast<double>(sum) >= needed; };
  const Crossing group = find_crossing(group_sum, [&](uint64_t sum) { return reaches(below + sum); });
  const uint64_t before = below + group.before;
  const uint64_t bin_sum = sum_team(histogram.bin + group.lane * kWarp + lane_index());
  const Crossing bin = find_crossing(bin_sum, [&](uint64_t sum) { return reaches(before + sum); });
  __syncwarp();  // all lanes have read the selection
  if (lane_index() == 0) {
    selection.needed = needed;
    selection.below = before + bin.before;
  }
  return group.lane * kWarp + bin.lane;
}

// Narrows the selection to one bin of the histogram just filled. Ends with the other one clear and current.
__device__ __forceinline__ void narrow(Selection& selection, const Filter& filter, bool is_first) {
  Histogram& histogram = selection.histogram[selection.current];
  Histogram& next = selection.histogram[1 - selection.current];
  __syncthreads();
  for (int group = warp_index(); group < kWarp; group += static_cast<int>(blockDim.x) / kWarp) {
    const uint64_t sum = sum_warp(histogram.bin[group * kWarp + lane_index()].value());
    if (lane_index() == 0) histogram.group[group] = sum;
  }
  team_sync();
  clear(next);  // safe: the team has finished reading it
  if (warp_index() == 0) {
    const int bin = crossing_bin(selection, histogram, filter, is_first);
    uint32_t first, last;
    if (is_first) {
      first = bin == 0 ? 0 : key_of(static_cast<float>(bin - 1) / 32.0f) + 1;
      last = bin == kBins - 1 ? kLastKey : key_of(static_cast<float>(bin) / 32.0f);
    } else {
      const int rank = lane_index() < team_size() ? lane_index() : 0;
      first = reduce_warp(*team_peer(histogram.lowest + bin, rank), smaller<uint32_t>);
      last = reduce_warp(*team_peer(histogram.highest + bin, rank), larger<uint32_t>);
    }
    if (lane_index() == 0) {
      selection.first = first;
      selection.last = last;
      selection.current = 1 - selection.current;
    }
  }
  __syncthreads();
}

__device__ __forceinline__ uint64_t amount_of(float x, const Filter& filter) {
  return filter.by_mass ? mass_of(exp_nonpositive(x)) : 1;
}

// Returns the smallest key such that the tokens up to it sum to what the filter needs, a share of the tokens up to
// limit. The whole team calls it; row.for_each(visit) calls visit(position, x) for every four tokens of the warp.
template <class Row>
__device__ __forceinline__ uint32_t select_key(const Row& row, Selection& selection, const Filter& filter,
                                               uint32_t limit) {
  row.for_each([&](int, const Quad& x) {
    int bin[4];
    uint64_t amount[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      bin[i] = first_bin(x.of[i]);
      amount[i] = key_of(x.of[i]) <= limit ? amount_of(x.of[i], filter) : 0;
    }
    add_to_bins(selection.histogram[selection.current].bin, bin, amount);
  });
  narrow(selection, filter, true);
  while (selection.first < selection.last) {
    const uint32_t first = selection.first, width = selection.last - first;
    // Bits of the width that exceed the number of a bin.
    const int excess = kWarp - __clz(static_cast<int>(width)) - 10;
    const int shift = excess > 0 ? excess : 0;
    Histogram& histogram = selection.histogram[selection.current];
    row.for_each([&](int, const Quad& x) {
      int bin[4];
      uint64_t amount[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t key = key_of(x.of[i]);
        bin[i] = static_cast<int>((key - first) >> shift);
        amount[i] = key - first <= width ? amount_of(x.of[i], filter) : 0;
        if (amount[i]) {
          atomicMin(&histogram.lowest[bin[i]], key);
          atomicMax(&histogram.highest[bin[i]], key);
        }
      }
      add_to_bins(histogram.bin, bin, amount);
    });
    narrow(selection, filter, false);
  }
  return selection.last;
}

}  // namespace llava_cot
