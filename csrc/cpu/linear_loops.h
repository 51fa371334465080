// Products of a few rows with a weight that is read once: x stays in the caches while the weight streams by.
#pragma once

#include "cpu/vec.h"

namespace llava_cot {
namespace {

// So many sums stay in registers, beside a vector of each row of the weight and one of x.
#if VECTOR_BYTES == 64
constexpr int TILE_ROWS = 4, TILE_X_ROWS = 6, ONE_ROW_X_ROWS = 6;
#elif VECTOR_BYTES == 32
constexpr int TILE_ROWS = 2, TILE_X_ROWS = 3, ONE_ROW_X_ROWS = 6;
#else
constexpr int TILE_ROWS = 1, TILE_X_ROWS = 3, ONE_ROW_X_ROWS = 3;
#endif
// While x has no more bytes, it stays in L1 whichever row of the weight is next. One row at a time is then the fastest,
// since the weight is read from one end to the other.
constexpr int64_t L1_BYTES = 12 << 10;

// STEP elements of a row of the weight and of x, as they are multiplied and added to 16 sums.
template <Weight W>
struct FewWidened {
  static constexpr int64_t STEP = LANES, X_ITEM = 4;
  static constexpr int64_t ITEM = W == Weight::FLOAT32 ? 4 : W == Weight::INT8 ? 1 : 2;

  static ALWAYS_INLINE Vec weight(const char* at) {
    if constexpr (W == Weight::INT8) return to_float(load_bytes(at));
    if constexpr (W == Weight::FLOAT32) return load<Dtype::FLOAT32>(at, 0);
    if constexpr (W == Weight::BFLOAT16) return load<Dtype::BFLOAT16>(at, 0);
    return load<Dtype::FLOAT16>(at, 0);
  }
  static ALWAYS_INLINE Vec x(const char* at) { return load(reinterpret_cast<const float*>(at)); }
  static ALWAYS_INLINE Vec add(Vec weight, Vec x, Vec sum) { return multiply_add(weight, x, sum); }
};

// Each sum runs over k in ascending order, 16 side by side, whatever the tile. So a row of x gives the same bits in
// every batch.
template <class Element, int ROWS, int X_ROWS>
ALWAYS_INLINE void multiply_tile(const FewRows& p, int64_t row, int64_t x_row) {
  constexpr int64_t STEP_BYTES = Element::STEP * Element::ITEM, X_STEP_BYTES = Element::STEP * Element::X_ITEM;
  const char *weight = p.weight + row * p.weight_stride, *x = p.x + x_row * p.x_stride;
  Vec sum[ROWS][X_ROWS];
  for (int r = 0; r < ROWS; ++r) {
    for (int m = 0; m < X_ROWS; ++m) sum[r][m] = 0.0f;
  }
  const auto add = [&](const char* at, int64_t stride) __attribute__((always_inline)) {
    decltype(Element::weight(at)) of_row[ROWS];
    for (int r = 0; r < ROWS; ++r) of_row[r] = Element::weight(at + r * stride);
    for (int m = 0; m < X_ROWS; ++m) {
      const auto of_x = Element::x(x + m * p.x_stride);
      for (int r = 0; r < ROWS; ++r) sum[r][m] = Element::add(of_row[r], of_x, sum[r][m]);
    }
  };
  int64_t left = p.depth;
  for (; left >= Element::STEP; left -= Element::STEP, weight += STEP_BYTES, x += X_STEP_BYTES) {
    // The hardware sees that one row follows another, but not where four are read side by side.
    for (int r = 0; ROWS > 1 && r < ROWS; ++r) __builtin_prefetch(weight + (ROWS + r) * p.weight_stride);
    add(weight, p.weight_stride);
  }
  if (left) {
    char last[ROWS][STEP_BYTES] = {};
    for (int r = 0; r < ROWS; ++r) __builtin_memcpy(last[r], weight + r * p.weight_stride, left * Element::ITEM);
    add(last[0], STEP_BYTES);
  }
  for (int r = 0; r < ROWS; ++r) {
    for (int m = 0; m < X_ROWS; ++m) p.out[(x_row + m) * p.out_stride + row + r] = sum_of(sum[r][m]);
  }
}

// size <= X_ROWS
template <class Element, int ROWS, int X_ROWS>
ALWAYS_INLINE void multiply_up_to(const FewRows& p, int64_t row, int64_t x_row, int64_t size) {
  if (size == X_ROWS) return multiply_tile<Element, ROWS, X_ROWS>(p, row, x_row);
  if constexpr (X_ROWS > 1) multiply_up_to<Element, ROWS, X_ROWS - 1>(p, row, x_row, size);
}

template <class Element, int ROWS>
ALWAYS_INLINE void multiply_rows(const FewRows& p, int64_t row) {
  constexpr int MOST = ROWS == 1 ? ONE_ROW_X_ROWS : TILE_X_ROWS;
  for (int64_t x_row = 0, size; x_row < p.num_x_rows; x_row += size) {
    const int64_t left = p.num_x_rows - x_row, tiles = (left + MOST - 1) / MOST;
    size = (left + tiles - 1) / tiles;
    multiply_up_to<Element, ROWS, MOST>(p, row, x_row, size);
  }
}

template <class Element>
void multiply_all(const FewRows& p) {
  int64_t row = 0;
  if (p.num_x_rows * p.depth * Element::X_ITEM > L1_BYTES) {
    for (; row + TILE_ROWS <= p.num_rows; row += TILE_ROWS) multiply_rows<Element, TILE_ROWS>(p, row);
  }
  for (; row < p.num_rows; ++row) multiply_rows<Element, 1>(p, row);
}

void multiply_few(const FewRows& p) {
  switch (p.kind) {
    case Weight::FLOAT32: return multiply_all<FewWidened<Weight::FLOAT32>>(p);
    case Weight::BFLOAT16: return multiply_all<FewWidened<Weight::BFLOAT16>>(p);
    case Weight::FLOAT16: return multiply_all<FewWidened<Weight::FLOAT16>>(p);
    case Weight::INT8: return multiply_all<FewWidened<Weight::INT8>>(p);
  }
}

}  // namespace
}  // namespace llava_cot
