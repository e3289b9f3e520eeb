// AVX2 and FMA. Byte products go through 16-bit halves: the quicker instruction for bytes saturates.
#include "kernels.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "lanes.h"

namespace burnish {
namespace avx2 {

struct Micro {
  static constexpr int rows = 2, panels = 2, attention_rows = 4;

  // Eight features' four products each, added up: bytes w (unsigned) times the row's four bytes, twice in `x`.
  static inline __m256i quads(__m256i w, __m256i x) {
    const __m256i low = _mm256_madd_epi16(_mm256_unpacklo_epi8(w, _mm256_setzero_si256()), x);
    const __m256i high = _mm256_madd_epi16(_mm256_unpackhi_epi8(w, _mm256_setzero_si256()), x);
    // low holds pairs of features 0, 1 and 4, 5; high those of 2, 3 and 6, 7; hadd restores their order.
    return _mm256_hadd_epi32(low, high);
  }

  static inline __m256i widened(const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return _mm256_broadcastq_epi64(_mm_cvtepi8_epi16(_mm_cvtsi32_si128(four)));
  }

  template <int R, int P>
  static void dot_int8(const uint8_t* w, size_t panel_bytes, const int8_t* const* a, int k_begin, int k_end, I16* acc) {
    __m256i sums[R * P * 2];
    std::memcpy(sums, acc, sizeof(sums));
    for (int k = k_begin; k < k_end; k += 4) {
      __m256i x[R];
      BURNISH_UNROLL
      for (int r = 0; r < R; ++r) x[r] = widened(a[r] + k);
      BURNISH_UNROLL
      for (int p = 0; p < P; ++p) {
        const uint8_t* at = w + p * panel_bytes + static_cast<size_t>(k) * kLanes;
        for (int h = 0; h < 2; ++h) {
          const __m256i weights = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 32 * h));
          BURNISH_UNROLL
          for (int r = 0; r < R; ++r) {
            __m256i& sum = sums[(r * P + p) * 2 + h];
            sum = _mm256_add_epi32(sum, quads(weights, x[r]));
          }
        }
      }
    }
    std::memcpy(acc, sums, sizeof(sums));
  }

  template <int R, int P>
  static void dot_int4(const uint8_t* w, size_t panel_bytes, const int8_t* const* a, int k_begin, int k_end, I16* acc) {
    const __m256i mask = _mm256_set1_epi8(15);
    __m256i sums[R * P * 2];
    std::memcpy(sums, acc, sizeof(sums));
    for (int k = k_begin; k < k_end; k += 8) {
      __m256i x[R], next[R];
      BURNISH_UNROLL
      for (int r = 0; r < R; ++r) x[r] = widened(a[r] + k), next[r] = widened(a[r] + k + 4);
      BURNISH_UNROLL
      for (int p = 0; p < P; ++p) {
        const uint8_t* at = w + p * panel_bytes + static_cast<size_t>(k) * kLanes / 2;
        for (int h = 0; h < 2; ++h) {
          const __m256i both = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at + 32 * h));
          const __m256i low = _mm256_and_si256(both, mask);
          const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), mask);
          BURNISH_UNROLL
          for (int r = 0; r < R; ++r) {
            __m256i& sum = sums[(r * P + p) * 2 + h];
            sum = _mm256_add_epi32(sum, _mm256_add_epi32(quads(low, x[r]), quads(high, next[r])));
          }
        }
      }
    }
    std::memcpy(acc, sums, sizeof(sums));
  }
};

#include "portable.inl"

}  // namespace avx2

const Kernels* avx2_kernels() {
  static const Kernels kernels = {
      "avx2",          avx2::pack_rows,   avx2::linear_rows, avx2::norm_row, avx2::rotate,
      avx2::store_key, avx2::store_value, avx2::attend,      avx2::scale_row, avx2::add,      avx2::adapt, avx2::activate_rows,
  };
  __builtin_cpu_init();
  const bool here = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return here ? &kernels : nullptr;
}

}  // namespace burnish
#else
namespace burnish {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace burnish
#endif
