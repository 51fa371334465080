// The arithmetic of a draw, which gives the same bits on every device: float32 operations that each round once (no
// fused multiply-add), and integers. llava_cot_kernels/reference/sampling.py has the same in PyTorch.
#pragma once

#include <cstdint>

#if defined(__CUDACC__)
#define HOST_DEVICE __host__ __device__ __forceinline__
#else
#define HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace llava_cot {

// exp(x) for x <= 0 within 2 ulp; exactly 1 at 0 and exactly 0 below -87. Branch-free, so that loops over it vectorise
// (libm's vector functions need -ffast-math). Cephes: x = n ln2 + r, a polynomial in r, then 2^n through the exponent.
HOST_DEVICE float exp_nonpositive(float x) {
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
  // A mask, not `x < -87 ? 0 : p * scale`: GCC joins that with the clamp into one branch and vectorises no loop over
  // it.
  const int32_t in_range = -static_cast<int32_t>(x >= -87.0f);
  const float scale = __builtin_bit_cast(float, ((static_cast<int32_t>(n) + 127) << 23) & in_range);
  return p * scale;
}

// trunc(weight * 2^40) for a weight in [0, 1]. On CPUs by shifts, since AVX2 has no conversion from float to a 64-bit
// integer.
HOST_DEVICE uint64_t mass_of(float weight) {
#if defined(__CUDA_ARCH__)
  return static_cast<uint64_t>(weight * 0x1p40f);
#else
  const uint32_t bits = __builtin_bit_cast(uint32_t, weight);
  const uint32_t exponent = 127 - (bits >> 23), shift = exponent < 63 ? exponent : 63;
  return (static_cast<uint64_t>((bits & 0x7fffff) | 0x800000) << 17) >> shift;
#endif
}

// The key ascends as x <= 0 descends. 0 and -0 have the same key.
HOST_DEVICE uint32_t key_of(float x) { return __builtin_bit_cast(uint32_t, x) & 0x7fffffff; }

// Words 1 and 0 of Philox4x32-10 (Salmon et al., 2011) as one 64-bit uniform.
HOST_DEVICE uint64_t philox(uint64_t seed, uint64_t position) {
  uint32_t c0 = static_cast<uint32_t>(position), c1 = static_cast<uint32_t>(position >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    const uint64_t p0 = uint64_t{0xD2511F53} * c0, p1 = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
  }
  return static_cast<uint64_t>(c1) << 32 | c0;
}

}  // namespace llava_cot
