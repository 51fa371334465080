// Vectorisation for the CPU kernels: one source, compiled for three instruction sets and chosen by cpuid at load.
#pragma once

#include <bit>
#include <cstdint>

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define MULTIVERSION __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MULTIVERSION
#endif
#define ALWAYS_INLINE inline __attribute__((always_inline))

namespace llava_cot {

// exp(x) for x <= 0 within 2 ulp; exactly 1 at 0 and exactly 0 below -87. Branch-free, so that loops over it vectorise
// (libm's vector functions need -ffast-math). Cephes: x = n ln2 + r, a polynomial in r, then 2^n through the exponent.
ALWAYS_INLINE float exp_nonpositive(float x) {
  const float clamped = x < -87.0f ? -87.0f : x;
  const float n = static_cast<float>(static_cast<int32_t>(clamped * 1.44269504088896341f - 0.5f));
  float r = clamped - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // A mask, not `x < -87 ? 0 : p * scale`: GCC joins that with the clamp into one branch and vectorises no loop over it.
  const int32_t in_range = -static_cast<int32_t>(x >= -87.0f);
  const float scale = std::bit_cast<float>(((static_cast<int32_t>(n) + 127) << 23) & in_range);
  return p * scale;
}

}  // namespace llava_cot
