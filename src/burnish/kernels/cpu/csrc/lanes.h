// Sixteen numbers at once, in the compilers' own vector types: one register with AVX-512, two with AVX2, four with SSE.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "scalar.h"

#define BURNISH_INLINE static inline __attribute__((always_inline))

// Before loops over the registers of a tile: left as loops, they would keep it in memory.
#if defined(__clang__)
#define BURNISH_UNROLL _Pragma("clang loop unroll(full)")
#else
#define BURNISH_UNROLL _Pragma("GCC unroll 32")
#endif

namespace burnish {

typedef float F16 __attribute__((vector_size(64)));
typedef int32_t I16 __attribute__((vector_size(64)));
typedef uint32_t U16 __attribute__((vector_size(64)));
typedef uint16_t H16 __attribute__((vector_size(32)));
typedef int8_t B16 __attribute__((vector_size(16)));
typedef uint8_t C16 __attribute__((vector_size(16)));

// x - 0 is x for every x, and known to be; 0 + x is not (it loses the sign of -0).
BURNISH_INLINE F16 splat(float x) { return x - F16{}; }

BURNISH_INLINE void prefetch(const void* from, size_t bytes) {
  for (size_t at = 0; at < bytes; at += 64) __builtin_prefetch(static_cast<const char*>(from) + at);
}

BURNISH_INLINE F16 load(const float* from) {
  F16 x;
  std::memcpy(&x, from, 64);
  return x;
}

BURNISH_INLINE void store(float* to, F16 x) { std::memcpy(to, &x, 64); }

BURNISH_INLINE F16 load_bf16(const uint16_t* from) {
#if defined(__AVX512F__)
  const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
  return (F16)_mm512_slli_epi32(wide, 16);
#endif
  H16 half;
  std::memcpy(&half, from, 32);
  return (F16)(__builtin_convertvector(half, U16) << 16);
}

BURNISH_INLINE void store_bf16(uint16_t* to, F16 x) {
  const U16 bits = (U16)x;
  const U16 rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const I16 numbers = x == x;
  const U16 picked = (rounded & (U16)numbers) | (~(U16)numbers & 0x7fc0u);
  const H16 half = __builtin_convertvector(picked, H16);
  std::memcpy(to, &half, 32);
}

BURNISH_INLINE F16 load_int8(const int8_t* from) {
#if defined(__AVX512F__)
  return (F16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#endif
  B16 bytes;
  std::memcpy(&bytes, from, 16);
  return __builtin_convertvector(bytes, F16);
}

BURNISH_INLINE F16 load_uint8(const uint8_t* from) {
#if defined(__AVX512F__)
  return (F16)_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
#endif
  C16 bytes;
  std::memcpy(&bytes, from, 16);
  return __builtin_convertvector(bytes, F16);
}

BURNISH_INLINE F16 load_half(const uint16_t* from) {
#if defined(__AVX512F__)
  return (F16)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
  F16 x;
  for (int lane = 0; lane < 16; ++lane) x[lane] = half_to_float(from[lane]);
  return x;
#endif
}

BURNISH_INLINE F16 select(I16 mask, F16 yes, F16 no) { return (F16)(((I16)yes & mask) | ((I16)no & ~mask)); }

// Whether a comparison holds in any lane.
BURNISH_INLINE bool any(I16 mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#else
  int32_t found = 0;
  for (int lane = 0; lane < 16; ++lane) found |= mask[lane];
  return found != 0;
#endif
}

BURNISH_INLINE F16 larger(F16 a, F16 b) { return select(a > b, a, b); }
BURNISH_INLINE F16 smaller(F16 a, F16 b) { return select(a < b, a, b); }

BURNISH_INLINE float sum_of(F16 x) {
  float total = 0.0f;
  for (int lane = 0; lane < 16; ++lane) total += x[lane];
  return total;
}

// 1 / x to the last place or two, for finite x that is not tiny.
BURNISH_INLINE F16 reciprocal(F16 x) {
#if defined(__AVX512F__)
  const F16 guess = (F16)_mm512_rcp14_ps((__m512)x);
  return guess * (2.0f - x * guess);
#else
  return 1.0f / x;
#endif
}

// e^x to about 2 units in the last place; 0 below -87.3, infinity above 88.7, NaN for NaN.
BURNISH_INLINE F16 exp_of(F16 x) {
  const F16 bounded = smaller(larger(x, splat(-87.3f)), splat(88.7f));
  const F16 n = (bounded * 1.44269504088896341f + kRoundMagic) - kRoundMagic;
  const F16 r = (bounded - n * 0.693359375f) + n * 2.12194440e-4f;
  F16 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
#if defined(__AVX512F__)
  F16 y = (F16)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  // Two halves of the exponent, so that the largest results do not overflow on the way.
  const I16 whole = __builtin_convertvector(n, I16);
  const I16 half = whole >> 1;
  F16 y = p * (F16)((half + 127) << 23) * (F16)((whole - half + 127) << 23);
#endif
  y = select(x < -87.3f, F16{}, y);
  y = select(x > 88.7f, (F16)(U16{} + 0x7f800000u), y);
  return select(x == x, y, x);
}

BURNISH_INLINE F16 tanh_of(F16 x) {
  const F16 bounded = smaller(larger(x, splat(-9.0f)), splat(9.0f));
  const F16 e = exp_of(bounded * 2.0f);
  // Near zero e - 1 loses digits; the series does not.
  const F16 square = x * x;
  const F16 series = x * (1.0f - square * (0.333333333f - square * 0.133333333f));
  const F16 y = select(square < 0.01f, series, (e - 1.0f) / (e + 1.0f));
  return select(x == x, y, x);
}

// Abramowitz and Stegun, Handbook of Mathematical Functions, 7.1.26: absolute error below 1.5e-7.
BURNISH_INLINE F16 erf_of(F16 x) {
  const F16 a = select(x < 0.0f, -x, x);
  const F16 t = 1.0f / (a * 0.3275911f + 1.0f);
  F16 p = splat(1.061405429f);
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const F16 y = 1.0f - p * t * exp_of(-a * a);
  return select(x < 0.0f, -y, y);
}

// x / (1 + e^(-slope x)); the exponent is bounded to keep the divisor finite, and beyond the bound nothing is left of x.
BURNISH_INLINE F16 times_sigmoid(F16 x, float slope) {
  const F16 power = x * -slope;
  const F16 y = x * reciprocal(exp_of(smaller(power, splat(80.0f))) + 1.0f);
  return select(power > 80.0f, x * 0.0f, y);
}

BURNISH_INLINE F16 activate(int activation, F16 x) {
  switch (activation) {
    case 1:
      return times_sigmoid(x, 1.0f);
    case 2:
      return x * 0.5f * (erf_of(x * 0.70710678118654752f) + 1.0f);
    case 3:
      return x * 0.5f * (tanh_of((x + x * x * x * 0.044715f) * 0.79788456080286536f) + 1.0f);
    case 4:
      return select(x < 0.0f, F16{}, x);
    case 5:
      return times_sigmoid(x, 1.702f);
    default:
      return x;
  }
}

}  // namespace burnish
