// Second moments in bfloat16 with matrix tiles. Included after training_tiles.inl.
//
// kGramRows rows are laid out once as left and as right factors, strip by strip: [strip][step of 32 rows][2 tiles].

static_assert(kGramStrip == 2 * kTileRows, "a strip is two tiles");

BURNISH_INLINE __m512i some_pair(const uint16_t* from, int64_t stride, int row, int rows, __mmask16 features) {
  const __m256i none = _mm256_setzero_si256();
  const __m256i first = row < rows ? _mm256_maskz_loadu_epi16(features, from + row * stride) : none;
  const __m256i second = row + 1 < rows ? _mm256_maskz_loadu_epi16(features, from + (row + 1) * stride) : none;
  return paired(_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1));
}

// rows: first .. first + count - 1 of x, zeros up to a multiple of 32.
static void gram_lay_out(const GramPass& pass, int strip, int first, int count, uint16_t* left, uint16_t* right) {
  const uint16_t* rows = pass.x + first * pass.x_stride;
  for (int row = 0; row < count; row += 32) {
    for (int tile = 0; tile < 2; ++tile) {
      const int feature = strip * kGramStrip + tile * kTileRows, missing = pass.width - feature;
      const uint32_t all = missing >= 16 ? 0xffffu : missing <= 0 ? 0u : (1u << missing) - 1u;
      __m512i lines[16];
      BURNISH_UNROLL
      for (int r = 0; r < 16; ++r) {
        lines[r] = some_pair(rows + (all ? feature : 0), pass.x_stride, row + 2 * r, count, static_cast<__mmask16>(all));
      }
      BURNISH_UNROLL
      for (int r = 0; r < 16; ++r) _mm512_storeu_si512(right + r * 32, lines[r]);
      turn_square(lines);
      BURNISH_UNROLL
      for (int r = 0; r < 16; ++r) _mm512_storeu_si512(left + r * 32, lines[r]);
      left += kTileNumbers;
      right += kTileNumbers;
    }
  }
}

// Adds the strip's rows of the total, from its first column to the strip's own last.
static void gram_multiply(const GramPass& pass, int strip, int count, const uint16_t* left, const uint16_t* right) {
  const Tiles tiles;
  const int steps = (count + 31) / 32, row = strip * kGramStrip;
  const int64_t whole = static_cast<int64_t>(steps) * 2 * kTileNumbers, width = pass.width;
  const uint16_t* upper = left + strip * whole;
  for (int other = 0; other <= strip; ++other) {
    const int column = other * kGramStrip;
    const bool inside = row + kGramStrip <= width && column + kGramStrip <= width;
    float* to = pass.total + row * width + column;
    alignas(64) float apart[kGramStrip * kGramStrip];
    if (inside) {
      load_sums(to, width, true);
    } else {
      load_sums(apart, kGramStrip, false);
    }
    const uint16_t* near = right + other * whole;
    for (int step = 0; step < steps; ++step) {
      const int64_t at = static_cast<int64_t>(step) * 2 * kTileNumbers;
      multiply_tiles(upper + at, upper + at + kTileNumbers, 32, near + at, near + at + kTileNumbers);
    }
    if (inside) {
      store_sums(to, width);
      continue;
    }
    store_sums(apart, kGramStrip);
    for (int r = 0; r < kGramStrip && row + r < width; ++r) {
      for (int c = 0; c < kGramStrip && column + c < width; ++c) to[r * width + c] += apart[r * kGramStrip + c];
    }
  }
}
