// The loops of every stem and the table of them, for the instruction set of the file that includes this.
#pragma once

#include "cpu/attention_loops.h"
#include "cpu/linear_loops.h"
#include "cpu/logprob_loops.h"
#include "cpu/sampling_loops.h"

namespace llava_cot {
namespace {

constexpr Loops table(const char* name, const PairLoops* pairs = nullptr) {
  return {name, widen, largest, find, row_sums, shape, keep, masses, histogram, compact, reduce_piece,
          logits_to_gradient, multiply_few, attend_block, pairs};
}

}  // namespace
}  // namespace llava_cot
