// Sixteen numbers at a time, to and from float32 and bfloat16, and the functions that fine-tuning needs of them. Included
// once per instruction set, inside a namespace of its own, before the other training_*.inl. T is float, or uint16_t for
// bfloat16.

BURNISH_INLINE F16 get(const float* from) { return load(from); }
BURNISH_INLINE F16 get(const uint16_t* from) { return load_bf16(from); }
BURNISH_INLINE void put(float* to, F16 x) { store(to, x); }
BURNISH_INLINE void put(uint16_t* to, F16 x) {
#if defined(__AVX512BF16__)
  const __m256bh half = _mm512_cvtneps_pbh((__m512)x);
  std::memcpy(to, &half, 32);
#else
  store_bf16(to, x);
#endif
}

// The first `count` values, zeros behind them; all sixteen where there are as many.
template <typename T>
BURNISH_INLINE F16 get(const T* from, int count) {
  if (count >= kLanes) return get(from);
  T some[kLanes] = {};
  std::memcpy(some, from, sizeof(T) * count);
  return get(some);
}

template <typename T>
BURNISH_INLINE void put(T* to, F16 x, int count) {
  if (count >= kLanes) return put(to, x);
  T some[kLanes];
  put(some, x);
  std::memcpy(to, some, sizeof(T) * count);
}

BURNISH_INLINE float as_float(float x) { return x; }
BURNISH_INLINE float as_float(uint16_t x) { return bf16_to_float(x); }
BURNISH_INLINE void set(float* to, float x) { *to = x; }
BURNISH_INLINE void set(uint16_t* to, float x) { *to = float_to_bf16(x); }

// As storing and reading it again.
template <typename T>
BURNISH_INLINE F16 rounded(F16 x) {
  if (sizeof(T) == 4) return x;
  T stored[kLanes];
  put(stored, x);
  return get(stored);
}

// Zeros from lane `count` on.
BURNISH_INLINE F16 keep(F16 x, int count) {
  if (count >= kLanes) return x;
  float lanes[kLanes] = {};
  std::memcpy(lanes, &x, sizeof(float) * count);
  return load(lanes);
}

// The nearest number between the two; NaN stays NaN.
BURNISH_INLINE F16 bounded(F16 x, float least, float most) {
#if defined(__AVX512F__)
  return (F16)_mm512_min_ps(_mm512_set1_ps(most), _mm512_max_ps(_mm512_set1_ps(least), (__m512)x));
#else
  return smaller(splat(most), larger(splat(least), x));
#endif
}

// e^x for x from -87 to 88 and for NaN, without the checks of exp_of.
BURNISH_INLINE F16 exp_within(F16 x) {
  const F16 n = (x * 1.44269504088896341f + kRoundMagic) - kRoundMagic;
  const F16 r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  F16 p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
#if defined(__AVX512F__)
  return (F16)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  const F16 real = select(n == n, n, F16{});
  const I16 whole = __builtin_convertvector(real, I16);
  const I16 half = whole >> 1;
  return p * (F16)((half + 127) << 23) * (F16)((whole - half + 127) << 23);
#endif
}

// e^x for x up to 0; 0 below -87. Results that float32 holds with fewer digits would each stop the processor for long.
BURNISH_INLINE F16 exp_below(F16 x) {
  const F16 y = exp_within(bounded(x, -87.0f, 1.0f));
#if defined(__AVX512F__)
  return (F16)_mm512_maskz_mov_ps(_mm512_cmp_ps_mask((__m512)x, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ), (__m512)y);
#else
  return select(x < -87.0f, F16{}, y);
#endif
}

BURNISH_INLINE F16 sigmoid_of(F16 x) { return reciprocal(exp_within(bounded(-x, -80.0f, 80.0f)) + 1.0f); }

// act(x) and its derivative. A is of Activation.
template <int A>
BURNISH_INLINE void derive(F16 x, F16* value, F16* slope) {
  if (A == kSilu || A == kQuickGelu) {
    constexpr float factor = A == kSilu ? 1.0f : 1.702f;
    // Beyond the bounds the sigmoid is 0 or 1, and an infinity would meet a zero.
    const F16 near = bounded(x * factor, -80.0f, 80.0f);
    const F16 sigmoid = sigmoid_of(near);
    *value = A == kSilu ? times_sigmoid(x, 1.0f) : times_sigmoid(x, 1.702f);
    *slope = sigmoid * (near * (1.0f - sigmoid) + 1.0f);
  } else if (A == kGelu) {
    const F16 near = bounded(x, -12.0f, 12.0f);
    const F16 share = erf_of(near * 0.70710678118654752f) * 0.5f + 0.5f;
    *value = x * share;
    *slope = share + near * exp_within(near * near * -0.5f) * 0.39894228040143268f;
  } else if (A == kGeluTanh) {
    // 0.5 (1 + tanh u) is the sigmoid of 2 u, which keeps its digits where tanh comes close to -1.
    const F16 near = bounded(x, -12.0f, 12.0f);
    const F16 square = near * near;
    const F16 sigmoid = sigmoid_of(near * (square * 0.044715f + 1.0f) * (2.0f * 0.79788456080286536f));
    *value = x * sigmoid;
    *slope = sigmoid + near * sigmoid * (1.0f - sigmoid) * (square * 0.134145f + 1.0f) * (2.0f * 0.79788456080286536f);
  } else if (A == kRelu) {
    *value = select(x < 0.0f, F16{}, x);
    *slope = select(x > 0.0f, splat(1.0f), select(x == x, F16{}, x));
  } else {
    *value = x;
    *slope = splat(1.0f);
  }
}

// The larger one; b where a is NaN.
BURNISH_INLINE F16 larger_of(F16 a, F16 b) {
#if defined(__AVX512F__)
  return (F16)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return larger(a, b);
#endif
}

// x in the lanes first .. last - 1, `other` in the rest; 0 <= first <= last <= 16.
BURNISH_INLINE F16 between(int first, int last, F16 x, F16 other) {
#if defined(__AVX512F__)
  const uint32_t lanes = ((1u << last) - 1u) & ~((1u << first) - 1u);
  return (F16)_mm512_mask_blend_ps(static_cast<__mmask16>(lanes), (__m512)other, (__m512)x);
#else
  const I16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return select((lane >= first) & (lane < last), x, other);
#endif
}

BURNISH_INLINE float total_of(F16 x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#else
  return sum_of(x);
#endif
}

// NaN is passed over, or not.
BURNISH_INLINE float peak_of(F16 x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#else
  float top = x[0];
  for (int lane = 1; lane < kLanes; ++lane) top = x[lane] > top ? x[lane] : top;
  return top;
#endif
}
