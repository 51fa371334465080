// The vectorised loops of every stem, compiled once for each instruction set, and the choice among them.
//
//   vec.h           a vector of 16 floats, as the vectors of one instruction set
//   <stem>_loops.h  the loops, on such vectors
//   isa/<name>.cpp  includes them all for one instruction set and fills a table with them
//
// All tables split work into the same 16 lanes and never let the compiler fuse a multiply-add on its own
// (-ffp-contract=off). Code without explicit ones, as in sampling, gives the same bits on all. AVX-512 with bfloat16
// products has a table of its own, the only one with `pairs`.
#pragma once

#include <cstdint>
#include <string_view>
#include <vector>

namespace llava_cot {

constexpr int LANES = 16;

enum class Dtype { FLOAT32, BFLOAT16, FLOAT16 };

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t round_up(int64_t size, int64_t multiple) { return ceil_div(size, multiple) * multiple; }

// ---- sampling ----

constexpr int64_t BLOCK = 256;  // tokens that share one float32 sum and one integer mass
constexpr int BIN_BITS = 10;
constexpr int NUM_BINS = 1 << BIN_BITS;
// Neighbours count into different copies, so that equal ones do not wait for each other.
constexpr int BIN_COPY_BITS = 2;
constexpr int BIN_COPIES = 1 << BIN_COPY_BITS;

struct RowSums {
  double partition;  // sum of exp(d)
  double weighted;   // sum of exp(d) d
};

// x = (logit - largest) / temperature, weight = exp(x); x is padded with -inf, weight with 0, to a multiple of LANES.
struct Tokens {
  const float *x, *weight;
  int64_t count;
};

// A key is an x <= 0 without its sign, as an integer: it ascends as x descends. Key k belongs to bin
// (k - base) >> shift, or to the nearest one that exists.
struct Bins {
  int32_t base, shift;
};

// What the filters keep: keys up to `limit` whose weight is at least `min_p`.
struct Kept {
  int32_t limit;
  float min_p;
};

struct Compacted {
  Tokens tokens;
  int32_t smallest, largest;  // key
};

// ---- log-probs ----

// A summary of some logits scale * x: the largest x and, with d = scale * (x - max), the sums of exp(d) and of exp(d) *
// d, which the entropy needs. The largest has d = 0 exactly. A NaN makes the sums NaN, never the maximum; all -inf:
// sums of 0.
struct Piece {
  float max, sum, weighted;
};

// The values of one row that the gradient of its logits needs.
struct RowGradient {
  float scale, lse, entropy, grad_logprob, grad_entropy;
};

// ---- products of a few rows ----

enum class Weight { FLOAT32, BFLOAT16, FLOAT16, INT8 };

constexpr int64_t FEW_ROWS_STEP = 32;  // elements; a row of x goes on with zeros up to a multiple of it

// out[m][n] = the sum of x[m][k] * weight[n][k] over k. Strides of x and of the weight are in bytes.
struct FewRows {
  Weight kind;
  const char* x;  // [num_x_rows][depth], float32, or bfloat16 for PairLoops
  int64_t x_stride;
  const char* weight;  // [num_rows][depth]
  int64_t weight_stride;
  int64_t num_x_rows, num_rows, depth;
  float* out;  // [num_x_rows][num_rows]
  int64_t out_stride;
};

// ---- products of bfloat16, summed in float32 ----

// Two values that follow each other along the summed dimension are one uint32_t, a pair: what one instruction
// multiplies. The right side of a product lies in panels of columns, [num_panels][num_pairs][PANEL].
constexpr int64_t PANEL = 4 * LANES;
constexpr int64_t PRODUCT_ROWS = 6;  // rows that are multiplied with a panel at a time

enum class Sum { STORE, ADD, STORE_BFLOAT16 };

struct PairProduct {
  const char* left;  // pair k of row m is m * row_stride + k * pair_stride bytes later, at any address
  int64_t row_stride, pair_stride;
  const uint32_t* panel;
  int64_t num_rows, num_columns, num_pairs;  // num_columns <= PANEL
  Sum how;
  void* out;  // [num_rows][num_columns], rows out_stride elements apart
  int64_t out_stride;
};

// Sixteen columns of transposed logits [num_tokens][stride], one for each row of hidden states.
struct LogitColumns {
  const float* x;
  int64_t num_tokens, stride;
  float scale;
};

// The values of those rows that the gradient needs. `target` counts from the first token and may be outside of them.
struct ColumnGradient {
  float lse[LANES], entropy[LANES], grad_logprob[LANES], grad_entropy[LANES];
  int32_t target[LANES];
};

struct PairLoops {
  void (*multiply)(const PairProduct& product);
  // out[i] = the pair of low[i] and high[i]
  void (*interleave)(const uint16_t* low, const uint16_t* high, int64_t n, uint32_t* out);
  void (*reduce)(const LogitColumns& logits, Piece* pieces);
  // Rounded to bfloat16: by_row [num_tokens][stride], and as pairs of tokens [num_tokens / 2, rounded up][stride].
  void (*to_gradient)(const LogitColumns& logits, const ColumnGradient& of, uint16_t* by_row, uint32_t* by_pair);
  void (*multiply_few)(const FewRows& product);
};

// ---- attention ----

constexpr int KEY_BLOCK = 64;
constexpr int UNROLL = 8;  // keys or dimensions that are summed side by side, to hide the latency of a multiply-add
constexpr int MAX_SLABS = 4;

struct alignas(64) Lanes {
  float of[LANES];
};

struct KeyBlock {
  Dtype dtype;
  int64_t head_dim;
  int64_t first, count;           // keys [first, first + count) of the sequence
  const char* keys[KEY_BLOCK];    // [head_dim] each
  const char* values[KEY_BLOCK];  // [head_dim] each
  float* scratch;                 // [scratch_size(head_dim)]

  static int64_t row_stride(int64_t head_dim) { return round_up(head_dim, UNROLL) + LANES; }
  static int64_t scratch_size(int64_t head_dim) { return KEY_BLOCK * row_stride(head_dim); }
};

// 16 query rows and their softmax so far. A lane without a row sees no key.
struct Slab {
  Lanes* query;     // [head_dim], times softmax_scale
  Lanes* weighted;  // [head_dim rounded up to UNROLL], sum of exp(score - max) * value
  Lanes max, sum;
  int64_t first[LANES], limit[LANES];  // the row sees the keys [first, limit)
};

// ---- the table ----

struct Loops {
  const char* name;

  void (*widen)(Dtype dtype, const void* source, int64_t n, float* target);

  // sampling
  float (*largest)(Dtype dtype, const void* logits, int64_t n);  // NaN if there is one
  int64_t (*find)(Dtype dtype, const void* logits, int64_t n, float logit);
  RowSums (*row_sums)(Dtype dtype, const void* logits, int64_t n, float largest);
  uint64_t (*shape)(Dtype dtype, const void* logits, int64_t n, float largest, float temperature, float* x,
                    float* weight, uint64_t* block_masses);
  uint64_t (*keep)(Tokens tokens, Kept kept, uint64_t* block_masses);
  void (*masses)(Tokens tokens, Kept kept, uint64_t* masses);
  void (*histogram)(Tokens tokens, int32_t limit, bool by_mass, Bins bins, uint64_t* histogram);
  Compacted (*compact)(Tokens tokens, int32_t first, int32_t last, float* x, float* weight);

  // log-probs
  Piece (*reduce_piece)(const float* x, int64_t n, float scale);
  void (*logits_to_gradient)(float* x, int64_t n, RowGradient row);

  // products of a few rows
  void (*multiply_few)(const FewRows& product);

  // attention
  void (*attend_block)(const KeyBlock& block, Slab* const* slabs, int64_t num_slabs);

  const PairLoops* pairs;  // null if bfloat16 is widened instead
};

extern const Loops AVX512_BF16_LOOPS, AVX512_LOOPS, AVX2_LOOPS, BASELINE_LOOPS;  // every machine has the last one

std::vector<const Loops*> available_loops();  // on this CPU, best first
const Loops& loops();                         // the best one, until use_loops chooses another
bool use_loops(std::string_view name);        // false if this CPU has none of that name

}  // namespace llava_cot
