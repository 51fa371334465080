// 16 floats, as the vectors of one instruction set: VECTOR_BYTES is 64, 32 or 16. Written with the compiler's own
// vector types, so that only what they lack needs intrinsics, and the same source serves machines other than x86.
//
// Only isa/<name>.cpp includes this, after every standard header. Code that is compiled here for one instruction set
// must not replace, at link time, code that others share. So it is in an unnamed namespace and uses nothing from std::.
#pragma once

#include "cpu/isa.h"

#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace llava_cot {
namespace {

constexpr int PARTS = 64 / VECTOR_BYTES;
constexpr float INF = __builtin_inff();

typedef float FloatPart __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t IntPart __attribute__((vector_size(VECTOR_BYTES)));
typedef uint16_t HalfPart __attribute__((vector_size(VECTOR_BYTES / 2)));

// The same at any address.
typedef FloatPart AnyFloatPart __attribute__((aligned(4), may_alias));
typedef IntPart AnyIntPart __attribute__((aligned(4), may_alias));
typedef HalfPart AnyHalfPart __attribute__((aligned(2), may_alias));

ALWAYS_INLINE FloatPart broadcast(float x) { return x - FloatPart{}; }  // 0 + x would be an addition: it makes -0 0

struct Vec {
  FloatPart part[PARTS];
  Vec() = default;
  ALWAYS_INLINE Vec(float all) {
    for (int i = 0; i < PARTS; ++i) part[i] = broadcast(all);
  }
};

// Comparisons give 0 or -1.
struct Ints {
  IntPart part[PARTS];
  Ints() = default;
  ALWAYS_INLINE Ints(int32_t all) {
    for (int i = 0; i < PARTS; ++i) part[i] = IntPart{} + all;
  }
};

#define LANEWISE(Result, Operand, name, expression)   \
  ALWAYS_INLINE Result name(Operand x, Operand y) {   \
    Result result;                                    \
    for (int i = 0; i < PARTS; ++i) {                 \
      const auto a = x.part[i], b = y.part[i];        \
      result.part[i] = expression;                    \
    }                                                 \
    return result;                                    \
  }
LANEWISE(Vec, Vec, operator+, a + b)
LANEWISE(Vec, Vec, operator-, a - b)
LANEWISE(Vec, Vec, operator*, a * b)
LANEWISE(Vec, Vec, operator/, a / b)
LANEWISE(Vec, Vec, max, a < b ? b : a)  // a where either is NaN
LANEWISE(Ints, Vec, operator==, a == b)
LANEWISE(Ints, Vec, operator!=, a != b)
LANEWISE(Ints, Vec, operator>=, a >= b)
LANEWISE(Ints, Ints, operator+, a + b)
LANEWISE(Ints, Ints, operator-, a - b)
LANEWISE(Ints, Ints, operator&, a & b)
LANEWISE(Ints, Ints, operator|, a | b)
LANEWISE(Ints, Ints, operator<=, a <= b)
LANEWISE(Ints, Ints, operator<, a < b)
LANEWISE(Ints, Ints, max, a < b ? b : a)
LANEWISE(Ints, Ints, min, a < b ? a : b)
#undef LANEWISE

#define CONVERT(Result, Operand, name, expression) \
  ALWAYS_INLINE Result name(Operand x) {           \
    Result result;                                 \
    for (int i = 0; i < PARTS; ++i) {              \
      const auto a = x.part[i];                    \
      result.part[i] = expression;                 \
    }                                              \
    return result;                                 \
  }
CONVERT(Ints, Vec, truncate, __builtin_convertvector(a, IntPart))
CONVERT(Vec, Ints, to_float, __builtin_convertvector(a, FloatPart))
CONVERT(Ints, Vec, bits_of, (IntPart)a)
CONVERT(Vec, Ints, float_of_bits, (FloatPart)a)
#undef CONVERT

ALWAYS_INLINE Ints shift_left(Ints x, int count) {
  for (int i = 0; i < PARTS; ++i) x.part[i] = x.part[i] << count;
  return x;
}

ALWAYS_INLINE Ints shift_right(Ints x, int count) {
  for (int i = 0; i < PARTS; ++i) x.part[i] = x.part[i] >> count;
  return x;
}

ALWAYS_INLINE Vec select(Ints mask, Vec yes, Vec no) {
  for (int i = 0; i < PARTS; ++i) yes.part[i] = mask.part[i] ? yes.part[i] : no.part[i];
  return yes;
}

// Rounds once if the instruction set has fused multiply-adds.
ALWAYS_INLINE FloatPart multiply_add(FloatPart a, FloatPart b, FloatPart c) {
#if VECTOR_BYTES == 64
  return (FloatPart)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif VECTOR_BYTES == 32
  return (FloatPart)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}

ALWAYS_INLINE Vec multiply_add(Vec a, Vec b, Vec c) {
  for (int i = 0; i < PARTS; ++i) c.part[i] = multiply_add(a.part[i], b.part[i], c.part[i]);
  return c;
}

// Bit i: lane i of a comparison.
ALWAYS_INLINE uint32_t lanes_of(Ints mask) {
#if VECTOR_BYTES == 64
  return _mm512_movepi32_mask((__m512i)mask.part[0]);
#else
  uint32_t bits = 0;
  for (int i = 0; i < PARTS; ++i) {
#if VECTOR_BYTES == 32
    bits |= static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask.part[i])) << 8 * i;
#elif defined(__SSE2__)
    bits |= static_cast<uint32_t>(_mm_movemask_ps((__m128)mask.part[i])) << 4 * i;
#else
    for (int lane = 0; lane < 4; ++lane) bits |= (mask.part[i][lane] & 1u) << (4 * i + lane);
#endif
  }
  return bits;
#endif
}

// ---- memory ----

ALWAYS_INLINE Vec load(const float* x) {
  Vec v;
  for (int i = 0; i < PARTS; ++i) v.part[i] = reinterpret_cast<const AnyFloatPart*>(x)[i];
  return v;
}

ALWAYS_INLINE Ints load(const int32_t* x) {
  Ints v;
  for (int i = 0; i < PARTS; ++i) v.part[i] = reinterpret_cast<const AnyIntPart*>(x)[i];
  return v;
}

ALWAYS_INLINE void store(Vec v, float* x) {
  for (int i = 0; i < PARTS; ++i) reinterpret_cast<AnyFloatPart*>(x)[i] = v.part[i];
}

ALWAYS_INLINE void store(Ints v, int32_t* x) {
  for (int i = 0; i < PARTS; ++i) reinterpret_cast<AnyIntPart*>(x)[i] = v.part[i];
}

// Writes the lanes whose bit is set one after the other and returns their number. It may write up to LANES anyway.
ALWAYS_INLINE int64_t store_lanes(Vec v, uint32_t lanes, float* out) {
#if VECTOR_BYTES == 64
  // In a register first: compressing into memory is many times slower.
  _mm512_storeu_ps(out, _mm512_maskz_compress_ps(static_cast<__mmask16>(lanes), (__m512)v.part[0]));
#else
  if (lanes == 0xffff) {
    store(v, out);
    return LANES;
  }
  float lane[LANES];
  store(v, lane);
  for (uint32_t rest = lanes; rest; rest &= rest - 1) *out++ = lane[__builtin_ctz(rest)];
#endif
  return __builtin_popcount(lanes);
}

ALWAYS_INLINE Ints load_halves(const void* x) {
  Ints v;
  for (int i = 0; i < PARTS; ++i) {
    v.part[i] = __builtin_convertvector(reinterpret_cast<const AnyHalfPart*>(x)[i], IntPart);
  }
  return v;
}

ALWAYS_INLINE Ints load_bytes(const void* x) {
  Ints v;
#if VECTOR_BYTES == 64
  v.part[0] = (IntPart)_mm512_maskz_cvtepi8_epi32(0xffff, _mm_loadu_si128(static_cast<const __m128i*>(x)));
#elif VECTOR_BYTES == 32
  for (int i = 0; i < PARTS; ++i) {
    v.part[i] = (IntPart)_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(static_cast<const char*>(x) + 8 * i)));
  }
#else
  for (int i = 0; i < LANES; ++i) v.part[i / 4][i % 4] = static_cast<const int8_t*>(x)[i];
#endif
  return v;
}

// The multiplication rebiases the exponent and normalises subnormals; inf and NaN keep their all-ones exponent.
ALWAYS_INLINE Vec widen_float16(Ints x) {
  const Ints magnitude = shift_left(x & 0x7fff, 13);
  const Vec finite = float_of_bits(magnitude) * 0x1p112f;
  const Ints special = (Ints(0x0f800000) <= magnitude) & 0x7f800000;
  return float_of_bits((bits_of(select(special, float_of_bits(magnitude), finite)) | special) |
                       shift_left(x & 0x8000, 16));
}

// Elements [i, i + LANES) of x as float32.
template <Dtype D>
ALWAYS_INLINE Vec load(const void* x, int64_t i) {
  if constexpr (D == Dtype::FLOAT32) return load(static_cast<const float*>(x) + i);
  const Ints halves = load_halves(static_cast<const uint16_t*>(x) + i);
  return D == Dtype::BFLOAT16 ? float_of_bits(shift_left(halves, 16)) : widen_float16(halves);
}

constexpr int32_t LANE[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// The same, with `fill` past the end of x.
template <Dtype D>
ALWAYS_INLINE Vec load(const void* x, int64_t i, int64_t n, float fill) {
  if (i + LANES <= n) return load<D>(x, i);
  constexpr int64_t ITEM = D == Dtype::FLOAT32 ? 4 : 2;
  char rest[LANES * ITEM] = {};
  __builtin_memcpy(rest, static_cast<const char*>(x) + i * ITEM, (n - i) * ITEM);
  return select(load(LANE) < Ints(static_cast<int32_t>(n - i)), load<D>(rest, 0), fill);
}

template <class Function>
ALWAYS_INLINE auto with_dtype(Dtype dtype, const Function& function) {
  switch (dtype) {
    case Dtype::BFLOAT16: return function.template operator()<Dtype::BFLOAT16>();
    case Dtype::FLOAT16: return function.template operator()<Dtype::FLOAT16>();
    default: return function.template operator()<Dtype::FLOAT32>();
  }
}

// Converts to float32.
void widen(Dtype dtype, const void* source, int64_t n, float* target) {
  with_dtype(dtype, [=]<Dtype D>() {
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) store(load<D>(source, i), target + i);
    if (i == n) return;
    float rest[LANES];
    store(load<D>(source, i, n, 0.0f), rest);
    __builtin_memcpy(target + i, rest, (n - i) * sizeof(float));
  });
}

// ---- functions ----

// Adds the upper half of the lanes to the lower half until one is left.
ALWAYS_INLINE float sum_of(Vec v) {
  for (int half = PARTS / 2; half > 0; half /= 2) {
    for (int i = 0; i < half; ++i) v.part[i] = v.part[i] + v.part[i + half];
  }
  FloatPart x = v.part[0];
#if VECTOR_BYTES == 64
  x = x + __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15, 0, 1, 2, 3, 4, 5, 6, 7);
  x = x + __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3, 12, 13, 14, 15, 8, 9, 10, 11);
  x = x + __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5, 10, 11, 8, 9, 14, 15, 12, 13);
#elif VECTOR_BYTES == 32
  x = x + __builtin_shufflevector(x, x, 4, 5, 6, 7, 0, 1, 2, 3);
  x = x + __builtin_shufflevector(x, x, 2, 3, 0, 1, 6, 7, 4, 5);
#else
  x = x + __builtin_shufflevector(x, x, 2, 3, 0, 1);
#endif
  return x[0] + x[1];
}

ALWAYS_INLINE float max_of(Vec v) {
  float lane[LANES];
  store(v, lane);
  for (int i = 1; i < LANES; ++i) lane[0] = lane[0] < lane[i] ? lane[i] : lane[0];
  return lane[0];
}

template <bool FUSED>
ALWAYS_INLINE Vec multiply_then_add(Vec a, Vec b, Vec c) {
  return FUSED ? multiply_add(a, b, c) : a * b + c;
}

// exp(x) for x <= 0 within 2 ulp; exactly 1 at 0, exactly 0 below -87. Cephes: x = n ln2 + r, a polynomial in r, then
// 2^n through the exponent. Without fused multiply-adds it has the same bits on every machine and device.
template <bool FUSED>
ALWAYS_INLINE Vec exp_nonpositive(Vec x) {
  const Vec clamped = max(x, -87.0f);
  const Ints whole = truncate(multiply_then_add<FUSED>(clamped, 1.44269504088896341f, -0.5f));
  const Vec n = to_float(whole);
  Vec r = multiply_then_add<FUSED>(n, -0.693359375f, clamped);
  r = multiply_then_add<FUSED>(n, 2.12194440e-4f, r);
  Vec p = 1.9875691500e-4f;
  for (const float coefficient : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f,
                                  5.0000001201e-1f}) {
    p = multiply_then_add<FUSED>(p, r, coefficient);
  }
  p = multiply_then_add<FUSED>(p, r * r, r) + 1.0f;
  const Ints exponent = shift_left(whole + 127, 23) & (x >= Vec(-87.0f));
  return p * float_of_bits(exponent);
}

}  // namespace
}  // namespace llava_cot
