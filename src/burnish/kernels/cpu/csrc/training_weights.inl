// Rebuilding frozen weights that are stored in four or eight bits. Included once per instruction set, after
// training_numbers.inl. A block of four-bit weights has sixteen values, which are scaled and rounded once and looked up.

// The processor's own rounding to bfloat16 takes numbers below float32's full precision for zeros.
BURNISH_INLINE void put_exactly(float* to, F16 x) { store(to, x); }
BURNISH_INLINE void put_exactly(uint16_t* to, F16 x) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  // As store_bf16, which compilers make twice as slow.
  __m256 halves[2];
  std::memcpy(halves, &x, 64);
  __m256i rounded[2];
  BURNISH_UNROLL
  for (int i = 0; i < 2; ++i) {
    const __m256i bits = _mm256_castps_si256(halves[i]);
    const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
    const __m256i sum = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7fff)), odd);
    const __m256i no_number = _mm256_castps_si256(_mm256_cmp_ps(halves[i], halves[i], _CMP_UNORD_Q));
    rounded[i] = _mm256_blendv_epi8(_mm256_srli_epi32(sum, 16), _mm256_set1_epi32(0x7fc0), no_number);
  }
  const __m256i mixed = _mm256_packus_epi32(rounded[0], rounded[1]);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(mixed, 0xd8));
#else
  store_bf16(to, x);
#endif
}

BURNISH_INLINE F16 widened(const int8_t* from) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  __m256 halves[2];
  BURNISH_UNROLL
  for (int i = 0; i < 2; ++i) {
    const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + 8 * i));
    halves[i] = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(bytes));
  }
  F16 x;
  std::memcpy(&x, halves, 64);
  return x;
#else
  return load_int8(from);
#endif
}

BURNISH_INLINE float block_scale(const DequantizePass& pass, int64_t block) {
  if (pass.absmax_levels == nullptr) return static_cast<const float*>(pass.absmax)[block];
  const float level = pass.absmax_levels[static_cast<const uint8_t*>(pass.absmax)[block]];
  // Through memory, as compilers would join product and sum, and round once instead of twice.
  const volatile float product = level * pass.absmax_scale[block / kScalesPerBlock];
  return product + *pass.absmax_offset;
}

// Two weights from each of `pairs` bytes, the first in the upper half.
BURNISH_INLINE void look_up(const uint8_t* from, int64_t pairs, const uint16_t* table, uint16_t* to) {
  int64_t i = 0;
#if defined(__AVX512BW__) && defined(__AVX512VL__)
  // The table stands there twice: of an index the lower four bits count.
  const __m512i values = _mm512_broadcast_i64x4(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(table)));
  for (; i < pairs; i += 16) {
    const int64_t left = pairs - i;
    const __mmask16 bytes = left >= 16 ? 0xffff : static_cast<__mmask16>((1u << left) - 1u);
    const __m512i wide = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(bytes, from + i));
    const __m512i index = _mm512_or_si512(_mm512_srli_epi32(wide, 4), _mm512_slli_epi32(wide, 16));
    const __m512i found = _mm512_permutexvar_epi16(index, values);
    _mm512_mask_storeu_epi32(to + 2 * i, bytes, found);
  }
#else
#if defined(__AVX2__)
  const __m128i lower = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  const __m128i upper = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table + 8));
  const __m128i byte = _mm_set1_epi16(0xff);
  const __m256i low = _mm256_broadcastsi128_si256(
      _mm_packus_epi16(_mm_and_si128(lower, byte), _mm_and_si128(upper, byte)));
  const __m256i high = _mm256_broadcastsi128_si256(
      _mm_packus_epi16(_mm_srli_epi16(lower, 8), _mm_srli_epi16(upper, 8)));
  for (; i + 16 <= pairs; i += 16) {
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
    const __m256i index = _mm256_and_si256(_mm256_or_si256(_mm256_srli_epi16(wide, 4), _mm256_slli_epi16(wide, 8)),
                                           _mm256_set1_epi8(15));
    const __m256i a = _mm256_shuffle_epi8(low, index), b = _mm256_shuffle_epi8(high, index);
    const __m256i even = _mm256_unpacklo_epi8(a, b), odd = _mm256_unpackhi_epi8(a, b);
    __m256i* out = reinterpret_cast<__m256i*>(to + 2 * i);
    _mm256_storeu_si256(out, _mm256_permute2x128_si256(even, odd, 0x20));
    _mm256_storeu_si256(out + 1, _mm256_permute2x128_si256(even, odd, 0x31));
  }
#endif
  for (; i < pairs; ++i) {
    to[2 * i] = table[from[i] >> 4];
    to[2 * i + 1] = table[from[i] & 15];
  }
#endif
}

BURNISH_INLINE void look_up(const uint8_t* from, int64_t pairs, const float* table, float* to) {
  int64_t i = 0;
#if defined(__AVX512F__)
  const __m512 values = _mm512_loadu_ps(table);
  for (; i + 8 <= pairs; i += 8) {
    const __m512i wide = _mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + i)));
    const __m512i index = _mm512_or_si512(_mm512_srli_epi64(wide, 4), _mm512_slli_epi64(wide, 32));
    _mm512_storeu_ps(to + 2 * i, _mm512_permutexvar_ps(index, values));
  }
#elif defined(__AVX2__)
  const __m256 lower = _mm256_loadu_ps(table), upper = _mm256_loadu_ps(table + 8);
  for (; i + 4 <= pairs; i += 4) {
    int32_t bytes;
    std::memcpy(&bytes, from + i, 4);
    const __m256i wide = _mm256_cvtepu8_epi64(_mm_cvtsi32_si128(bytes));
    const __m256i index = _mm256_or_si256(_mm256_srli_epi64(wide, 4), _mm256_slli_epi64(wide, 32));
    const __m256 in_upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));
    _mm256_storeu_ps(to + 2 * i, _mm256_blendv_ps(_mm256_permutevar8x32_ps(lower, index),
                                                  _mm256_permutevar8x32_ps(upper, index), in_upper));
  }
#endif
  for (; i < pairs; ++i) {
    to[2 * i] = table[from[i] >> 4];
    to[2 * i + 1] = table[from[i] & 15];
  }
}

template <typename T>
static void dequantize_blocks(const DequantizePass& pass, int first, int last) {
  const int64_t size = pass.block_size;
  const uint8_t* codes = static_cast<const uint8_t*>(pass.codes);
  const F16 levels = load(pass.levels);
  for (int row = first; row < last; ++row) {
    T* out = static_cast<T*>(pass.out) + row * pass.out_stride;
    int64_t at = static_cast<int64_t>(row) * pass.width, block = at / size;
    const int64_t end = at + pass.width;
    while (at < end) {
      T table[kLanes];
      put_exactly(table, levels * block_scale(pass, block));
      ++block;
      const int64_t until = block * size < end ? block * size : end;
      if (at % 2 != 0) *out++ = table[codes[at++ / 2] & 15];
      const int64_t pairs = (until - at) / 2;
      look_up(codes + at / 2, pairs, table, out);
      at += 2 * pairs;
      out += 2 * pairs;
      if (at < until) *out++ = table[codes[at++ / 2] >> 4];
    }
  }
}

template <typename T>
static void dequantize_rows(const DequantizePass& pass, int first, int last) {
  const int whole = pass.width / kLanes * kLanes;
  for (int row = first; row < last; ++row) {
    const int8_t* codes = static_cast<const int8_t*>(pass.codes) + static_cast<int64_t>(row) * pass.width;
    T* out = static_cast<T*>(pass.out) + row * pass.out_stride;
    const float scale = static_cast<const float*>(pass.absmax)[row];
    for (int j = 0; j < whole; j += kLanes) put_exactly(out + j, widened(codes + j) * scale);
    for (int j = whole; j < pass.width; ++j) set(out + j, codes[j] * scale);
  }
}

static void dequantize(const DequantizePass& pass, int first, int last) {
  if (pass.levels != nullptr) {
    if (pass.format == kF32) return dequantize_blocks<float>(pass, first, last);
    return dequantize_blocks<uint16_t>(pass, first, last);
  }
  if (pass.format == kF32) return dequantize_rows<float>(pass, first, last);
  dequantize_rows<uint16_t>(pass, first, last);
}
