// The steps that the blocks of a team take for one candidate, from its row to its token.
//   load    reads the row once, into the team's shared memory as float32, and finds the largest logit
//   score   d = l - max(l): the raw distribution's partition function and entropy; x = d / temperature takes l's place
//   select  the smallest x that top_k and top_p keep (select.cuh)
//   keep    the masses that the filters keep, summed over runs of consecutive tokens
//   draw    Philox, then the inverse CDF: over blocks, runs, tokens; scores and the tag automaton
// All sums over threads are integers, so no result depends on the size of the team. Blocks of a team meet
// once after load, once in every histogram (usually two for a filter) and once after keep.
#pragma once

#include <cmath>

#include "cuda/select.cuh"
#include "sampling_checks.h"

namespace llava_cot {

constexpr int kMaxThreads = 512;          // per block; two blocks fit on a multiprocessor
constexpr int kStep = 4 * kWarp;          // tokens that a warp handles at a time
constexpr int kRuns = 4;                  // runs of tokens per warp
constexpr float kInfinity = INFINITY;
constexpr int kNone = 0x7fffffff;  // above all positions

struct Arguments : Candidates {
  StageTags tags;
  int64_t num_rows, vocabulary, row_stride;
  int slice, num_cached;  // tokens of a block, padded, and how many are in shared memory
};

// The data that a block shares with its team. The cached part of its slice of the row follows in memory.
struct Board {
  Selection selection;
  Sum partition, weighted, kept;  // sums of exp(d), of exp(d) (-d) and of masses, with 40 fractional bits
  uint64_t run[kMaxThreads / kWarp * kRuns];  // masses of runs, in token order
  uint32_t largest;                           // as ordered() gives it
  int best;                                   // position of the first logit that is the largest of the row, or kNone
  uint64_t seed, position;
};
static_assert(sizeof(Board) % sizeof(Quad) == 0);

// Ascends with x; NaN is above all numbers.
__device__ __forceinline__ uint32_t ordered(float x) {
  const uint32_t bits = __float_as_uint(x);
  return x != x ? 0xffffffffu : bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float from_ordered(uint32_t order) {
  return __uint_as_float(order >> 31 ? order & 0x7fffffffu : ~order);
}

// Four logits, as one load reads them and as float32.
template <class T>
struct alignas(4 * sizeof(T)) Packed {
  uint32_t of[sizeof(T)];

  __device__ __forceinline__ Quad unpack() const {
    struct Logits {
      T of[4];
    };
    const auto logits = __builtin_bit_cast(Logits, *this);
    return {static_cast<float>(logits.of[0]), static_cast<float>(logits.of[1]), static_cast<float>(logits.of[2]),
            static_cast<float>(logits.of[3])};
  }
};

template <class T>
__device__ __forceinline__ Packed<T> load_packed(const T* address) {
  return load(reinterpret_cast<const Packed<T>*>(address));
}

// A block's slice of a row, at positions from 0, with -inf after its end. kFits: all of it is in shared memory.
template <class T, bool kFits>
struct Slice {
  // Loads before the first is used; registers limit them.
  static constexpr int kInFlight = kFits || sizeof(T) == 2 ? 8 : 4;
  const T* logits;
  int num_tokens;  // <= 0 if the row ends before the slice
  int num_quads;   // below this, each position starts four tokens that one load can read
  float* cached;   // l until score has run, then x
  int num_cached;
  int begin, end;  // this warp's positions
  float largest = 0.0f, temperature = 1.0f;

  __device__ __forceinline__ bool is_cached(int position) const { return kFits || position < num_cached; }
  __device__ __forceinline__ Quad& cache(int position) const { return *reinterpret_cast<Quad*>(cached + position); }

  __device__ __forceinline__ Quad read_singly(int position) const {
    Quad quad;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      quad.of[i] = position + i < num_tokens ? static_cast<float>(load(logits + position + i)) : -kInfinity;
    }
    return quad;
  }

  __device__ __forceinline__ Quad l(int position) const {
    if (is_cached(position)) return cache(position);
    return position < num_quads ? load_packed(logits + position).unpack() : read_singly(position);
  }

  __device__ __forceinline__ float shape(float logit) const {
    const float d = logit - largest;
    return temperature == 1.0f ? d : d / temperature;
  }

  __device__ __forceinline__ Quad x(int position) const {
    Quad quad = l(position);
    if (is_cached(position)) return quad;
#pragma unroll
    for (int i = 0; i < 4; ++i) quad.of[i] = shape(quad.of[i]);
    return quad;
  }

  __device__ __forceinline__ float x_at(int position) const {
    if (is_cached(position)) return cached[position];
    return position < num_tokens ? shape(static_cast<float>(load(logits + position))) : -kInfinity;
  }

  // Calls visit(position, x) for every four tokens of this warp from position `from` to `to`.
  template <class Visit>
  __device__ __forceinline__ void for_each(int from, int to, const Visit& visit) const {
    for (int position = from + 4 * lane_index(); position < to; position += kStep) visit(position, x(position));
  }
  template <class Visit>
  __device__ __forceinline__ void for_each(const Visit& visit) const {
    for_each(begin, end, visit);
  }
};

struct Shape {
  bool is_greedy;
  float top_k, top_p, min_p;  // top_k: 0 if off
  uint32_t limit = kNoLimit;  // the largest key that top_k and top_p keep

  __device__ __forceinline__ uint64_t mass(float x) const {
    if (key_of(x) > limit) return 0;
    const float weight = exp_nonpositive(x);
    return weight >= min_p ? mass_of(weight) : 0;
  }
};

// ---- the steps ----

__device__ __forceinline__ void reset(Board& board) {
  clear(board.selection.histogram[0]);
  if (threadIdx.x == 0) {
    board.selection.current = 0;
    board.partition = board.weighted = board.kept = {0, 0};
    board.largest = 0;
    board.best = kNone;
  }
}

struct Largest {
  float value = -kInfinity;
  bool has_nan = false;

  __device__ __forceinline__ void see(const Quad& quad) {
#pragma unroll
    for (const float logit : quad.of) {
      value = fmaxf(value, logit);
      has_nan |= logit != logit;
    }
  }
};

template <class Row>
__device__ __forceinline__ void load_slice(const Row& row, Board& board) {
  constexpr int kInFlight = Row::kInFlight;
  Largest largest;
  const auto keep = [&](int position, const Quad& quad) {
    largest.see(quad);
    if (row.is_cached(position)) row.cache(position) = quad;
  };
  const int begin = row.begin + 4 * lane_index(), end_of_quads = smaller(row.num_quads, row.end);
  for (int base = begin; base < end_of_quads; base += kInFlight * kStep) {
    decltype(load_packed(row.logits)) packed[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (base + i * kStep < end_of_quads) packed[i] = load_packed(row.logits + base + i * kStep);
    }
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      if (base + i * kStep < end_of_quads) keep(base + i * kStep, packed[i].unpack());
    }
  }
  // The rest after the loop: the end of the row, a whole row whose address is not aligned for quads, and padding.
  const int num_steps = begin < end_of_quads ? (end_of_quads - begin - 1) / kStep + 1 : 0;
#pragma unroll 2
  for (int position = begin + num_steps * kStep; position < row.end; position += kStep) {
    keep(position, row.read_singly(position));
  }
  const uint32_t order = reduce_warp(largest.has_nan ? 0xffffffffu : ordered(largest.value), larger<uint32_t>);
  __syncthreads();  // the board is reset
  if (lane_index() == 0) atomicMax(&board.largest, order);
}

template <class Row>
__device__ __forceinline__ void score_slice(const Row& row, Board& board, bool is_greedy) {
  uint64_t partition = 0, weighted = 0;
  int best = kNone;
  for (int position = row.begin + 4 * lane_index(); position < row.end; position += kStep) {
    Quad quad = row.l(position);
    float of_quad = 0.0f, weighted_of_quad = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float d = quad.of[i] - row.largest;
      const float e = exp2_approximate(d * 1.44269504088896341f);
      of_quad += e;
      weighted_of_quad += e * fminf(-d, 128.0f);  // e is 0 there; a masked token would add 0 * inf
      if (is_greedy && d == 0.0f) best = smaller(best, position + i);
      quad.of[i] = row.shape(quad.of[i]);
    }
    partition += static_cast<uint64_t>(of_quad * 0x1p40f);
    weighted += static_cast<uint64_t>(weighted_of_quad * 0x1p40f);
    if (row.is_cached(position)) row.cache(position) = quad;
  }
  partition = sum_warp(partition);
  weighted = sum_warp(weighted);
  if (is_greedy) best = reduce_warp(best, smaller<int>);
  if (lane_index() == 0) {
    board.partition.add(partition);
    board.weighted.add(weighted);
    atomicMin(&board.best, best);
  }
}

// A run of consecutive tokens. A block has kRuns of them per warp.
struct Run {
  int begin, end;
};

template <class Row>
__device__ __forceinline__ Run run_of(const Row& row, int index, int of_warp) {
  const int length = ((of_warp / kStep - 1) / kRuns + 1) * kStep;
  const int end_of_warp = (index / kRuns + 1) * of_warp, begin = index / kRuns * of_warp + index % kRuns * length;
  return {smaller(begin, end_of_warp), smaller(begin + length, end_of_warp)};
}

template <class Row>
__device__ __forceinline__ void keep_slice(const Row& row, Board& board, const Shape& shape) {
  for (int index = warp_index() * kRuns; index < (warp_index() + 1) * kRuns; ++index) {
    const Run run = run_of(row, index, row.end - row.begin);
    uint64_t mass = 0;
    row.for_each(run.begin, run.end, [&](int, const Quad& x) {
#pragma unroll
      for (const float value : x.of) mass += shape.mass(value);
    });
    mass = __any_sync(kFullWarp, mass != 0) ? sum_warp(mass) : 0;
    if (lane_index() == 0) {
      board.run[index] = mass;
      if (mass) board.kept.add(mass);
    }
  }
}

struct Draw {
  int position;    // the token's, or kNone in blocks that do not hold it
  uint64_t total;  // the mass of all kept tokens
};

// Run by one warp of each block. The target's token is in one of the blocks.
template <class Row>
__device__ __forceinline__ Draw draw(const Row& row, const Board& board, const Shape& shape) {
  const int lane = lane_index();
  const uint64_t of_block = lane < team_size() ? team_peer(&board.kept, lane)->value() : 0;
  const uint64_t uniform = philox(board.seed, board.position);  // overlaps with the loads of the peers' masses
  const uint64_t total = sum_warp(of_block);
  uint64_t target = __umul64hi(uniform, total);
  const auto is_beyond = [&](uint64_t sum) { return target < sum; };
  const Crossing block = find_crossing(of_block, is_beyond);
  if (smaller(block.lane, team_size() - 1) != team_rank()) return {kNone, total};
  target -= block.before;

  const int num_warps = static_cast<int>(blockDim.x) / kWarp, runs_of_lane = num_warps * kRuns / kWarp;
  uint64_t of_lane = 0;
#pragma unroll 1
  for (int i = 0; i < runs_of_lane; ++i) of_lane += board.run[lane * runs_of_lane + i];
  const Crossing runs = find_crossing(of_lane, is_beyond);
  target -= runs.before;
  int index = runs.lane * runs_of_lane;
  for (const int last = index + runs_of_lane - 1; index < last && target >= board.run[index]; ++index) {
    target -= board.run[index];
  }

  Run run = run_of(row, index, row.end - row.begin);
  while (run.end - run.begin > 1) {
    const int part = (run.end - run.begin - 1) / kWarp + 1, begin = run.begin + lane * part;
    uint64_t mass = 0;
    int offset = lane % part;  // lanes start apart, so that they read different banks
    for (int i = 0; i < part; ++i) {
      if (begin + offset < run.end) mass += shape.mass(row.x_at(begin + offset));
      offset = offset + 1 < part ? offset + 1 : 0;
    }
    const Crossing tokens = find_crossing(mass, is_beyond);
    target -= tokens.before;
    run.begin += tokens.lane * part;
    run.end = smaller(run.begin + part, run.end);
  }
  return {smaller(run.begin, row.num_tokens - 1), total};
}

// ---- a candidate ----

struct Scores {
  float logprob = 0.0f, entropy = 0.0f, sampling_logprob = 0.0f;
};

// Run by one thread of the team.
__device__ __forceinline__ void write(const Arguments& a, int64_t n, int64_t token, const Scores& scores,
                                      int32_t status) {
  store(a.token + n, token);
  store(a.logprob + n, scores.logprob);
  store(a.entropy + n, scores.entropy);
  store(a.sampling_logprob + n, scores.sampling_logprob);
  store(a.status + n, status);
  TagStep step{0, -1, 0};
  if (a.tags.table) {
    step = advance(a.tags, load(a.tag_state + n), token);
    store(a.tag_state + n, step.state);
  }
  store(a.tag + n, step.tag);
  store(a.overhang + n, step.overhang);
}

// Run by one warp of each block. It does nothing in blocks that do not hold the token.
template <class Row>
__device__ __forceinline__ void finish(const Row& row, const Board& board, const Shape& shape, const Arguments& a,
                                       int64_t n) {
  Draw drawn{board.best, 0};
  if (shape.is_greedy) {
    for (int rank = 0; rank < team_rank(); ++rank) {
      if (*team_peer(&board.best, rank) != kNone) drawn.position = kNone;
    }
  } else {
    drawn = draw(row, board, shape);
  }
  if (drawn.position == kNone) return;
  const double partition = static_cast<double>(sum_team(&board.partition)) * 0x1p-40;
  const double weighted = static_cast<double>(sum_team(&board.weighted)) * 0x1p-40;
  // Lanes compute their logarithms at the same time.
  const double logarithm = log(lane_index() == 0 ? partition : static_cast<double>(drawn.total) * 0x1p-40);
  const double log_total = __shfl_sync(kFullWarp, logarithm, 1);
  if (lane_index() == 0) {
    const float d = static_cast<float>(load(row.logits + drawn.position)) - row.largest;
    Scores scores;
    scores.logprob = static_cast<float>(d - logarithm);
    scores.entropy = static_cast<float>(logarithm + weighted / partition);
    if (!shape.is_greedy) scores.sampling_logprob = static_cast<float>(d / row.temperature - log_total);
    write(a, n, static_cast<int64_t>(team_rank()) * a.slice + drawn.position, scores, 0);
  }
}

template <class T, bool kFits>
__device__ __forceinline__ void sample_row(const T* logits, const Arguments& a, int64_t n, Board& board) {
  const int first_token = team_rank() * a.slice, of_warp = a.slice / (static_cast<int>(blockDim.x) / kWarp);
  const int num_tokens = static_cast<int>(smaller<int64_t>(a.vocabulary - first_token, a.slice));
  const bool is_aligned = reinterpret_cast<uintptr_t>(logits) % (4 * sizeof(T)) == 0;
  Slice<T, kFits> row{logits + first_token,
                      num_tokens,
                      is_aligned ? num_tokens - 3 : 0,
                      reinterpret_cast<float*>(&board + 1),
                      a.num_cached,
                      warp_index() * of_warp,
                      (warp_index() + 1) * of_warp};
  // The loads of the parameters overlap with that of the row.
  const float temperature = load_uniform(a.temperature + n), top_p = load_uniform(a.top_p + n);
  const float min_p = load_uniform(a.min_p + n);
  const int64_t top_k = load_uniform(a.top_k + n);
  const int64_t seed = load_uniform(a.seed + n), position = load_uniform(a.position + n);
  reset(board);
  load_slice(row, board);
  if (threadIdx.x == 0) {
    board.seed = static_cast<uint64_t>(seed);
    board.position = static_cast<uint64_t>(position);
  }
  team_sync();
  uint32_t largest = 0;
  for (int rank = 0; rank < team_size(); ++rank) largest = larger(largest, *team_peer(&board.largest, rank));
  row.largest = from_ordered(largest);
  if (largest >= ordered(kInfinity) || largest <= ordered(-kInfinity)) {  // NaN or +inf; or only -inf
    if (team_rank() == 0 && threadIdx.x == 0) write(a, n, -1, {}, 1);
    return;
  }
  Shape shape{!(temperature > 0.0f), top_k < a.vocabulary ? static_cast<float>(top_k) : 0.0f, top_p, min_p};
  if (!shape.is_greedy) row.temperature = temperature;
  score_slice(row, board, shape.is_greedy);
  if (!shape.is_greedy) {
#pragma unroll 1  // keeps the code small, since it may be in no instruction cache at a launch
    for (int filter = 0; filter < 2; ++filter) {
      const bool by_mass = filter == 1;
      const bool is_on = by_mass ? shape.top_p < 1.0f : shape.top_k > 0.0f;
      const Filter needed{by_mass, by_mass ? shape.top_p : shape.top_k};
      if (is_on) shape.limit = select_key(row, board.selection, needed, shape.limit);
    }
    keep_slice(row, board, shape);
  }
  team_sync();
  if (warp_index() == 0) finish(row, board, shape, a, n);
}

}  // namespace llava_cot
