// The loops for AVX-512 with products of bfloat16. isa.cpp looks for the same features.
#if defined(__x86_64__)
#include "cpu/isa.h"  // and with it the standard headers, before anything is compiled for more than x86-64

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(                                                                       \
    __attribute__((target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,popcnt"))), apply_to = function)
#else
#pragma GCC target("avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,bmi,bmi2,popcnt")
#endif
#define VECTOR_BYTES 64
#include "cpu/isa/table.h"
#include "cpu/pair_loops.h"

namespace llava_cot {
constinit const Loops AVX512_BF16_LOOPS = table("avx512_bf16", &PAIR_LOOPS);
}
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif
