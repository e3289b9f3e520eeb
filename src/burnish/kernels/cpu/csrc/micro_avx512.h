// Byte products with AVX-512 VNNI. Included inside the namespace of each instruction set that has it.

struct Micro {
  static constexpr int rows = 6, panels = 4, attention_rows = 8;

  static inline __m512i four_bytes(const int8_t* x) {
    int32_t four;
    std::memcpy(&four, x, 4);
    return _mm512_set1_epi32(four);
  }

  template <int R, int P>
  static inline void dot_int8(const uint8_t* w, size_t panel_bytes, const int8_t* const* a, int k_begin, int k_end,
                              I16* acc) {
    __m512i sums[R * P];
    BURNISH_UNROLL
    for (int i = 0; i < R * P; ++i) sums[i] = (__m512i)acc[i];
    for (int k = k_begin; k < k_end; k += 4) {
      const uint8_t* at = w + static_cast<size_t>(k) * kLanes;
      __m512i weights[P];
      BURNISH_UNROLL
      for (int p = 0; p < P; ++p) {
        weights[p] = _mm512_loadu_si512(at + p * panel_bytes);
        _mm_prefetch(reinterpret_cast<const char*>(at + p * panel_bytes + kAhead), _MM_HINT_T0);
      }
      BURNISH_UNROLL
      for (int r = 0; r < R; ++r) {
        const __m512i x = four_bytes(a[r] + k);
        BURNISH_UNROLL
        for (int p = 0; p < P; ++p) sums[r * P + p] = _mm512_dpbusd_epi32(sums[r * P + p], weights[p], x);
      }
    }
    BURNISH_UNROLL
    for (int i = 0; i < R * P; ++i) acc[i] = (I16)sums[i];
  }

  template <int R, int P>
  static inline void dot_int4(const uint8_t* w, size_t panel_bytes, const int8_t* const* a, int k_begin, int k_end,
                              I16* acc) {
    const __m512i mask = _mm512_set1_epi8(15);
    __m512i sums[R * P];
    BURNISH_UNROLL
    for (int i = 0; i < R * P; ++i) sums[i] = (__m512i)acc[i];
    for (int k = k_begin; k < k_end; k += 8) {
      const uint8_t* at = w + static_cast<size_t>(k) * kLanes / 2;
      __m512i low[P], high[P];
      BURNISH_UNROLL
      for (int p = 0; p < P; ++p) {
        const __m512i both = _mm512_loadu_si512(at + p * panel_bytes);
        _mm_prefetch(reinterpret_cast<const char*>(at + p * panel_bytes + kAhead), _MM_HINT_T0);
        low[p] = _mm512_and_si512(both, mask);
        high[p] = _mm512_and_si512(_mm512_srli_epi16(both, 4), mask);
      }
      BURNISH_UNROLL
      for (int r = 0; r < R; ++r) {
        const __m512i x = four_bytes(a[r] + k), next = four_bytes(a[r] + k + 4);
        BURNISH_UNROLL
        for (int p = 0; p < P; ++p) {
          sums[r * P + p] = _mm512_dpbusd_epi32(sums[r * P + p], low[p], x);
          sums[r * P + p] = _mm512_dpbusd_epi32(sums[r * P + p], high[p], next);
        }
      }
    }
    BURNISH_UNROLL
    for (int i = 0; i < R * P; ++i) acc[i] = (I16)sums[i];
  }

  // How far before its use a weight is asked for, in bytes: memory is the limit for one row, and this hides its latency.
  static constexpr int kAhead = 1024;
};
