// Laying rows of bfloat16 out as factors of matrix tiles. Included before training_tiles.inl.
//
// A tile of the left factor is 16 rows of 32 numbers; one of the right factor 16 pairs of rows: [16][16 columns][2].

constexpr int kTileBlock = 32;        // queries whose scores are made at once
constexpr int kTileQueries = 128;     // queries whose weights are kept for the gradients of keys and values
constexpr int kPieceTiles = kKeyPiece / kTileRows;
constexpr int64_t kScoreStride = kKeyPiece + kLanes;   // off the powers of two, which share sets of the cache
constexpr int64_t kWeightStride = kKeyPiece + 2 * kLanes;
constexpr int kTileNumbers = kTileSize / 2;

// A square of 16 x 16 numbers of 32 bits, turned.
BURNISH_INLINE void turn_square(__m512i* rows) {
  __m512i half[16];
  BURNISH_UNROLL
  for (int i = 0; i < 16; i += 2) {
    half[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    half[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  BURNISH_UNROLL
  for (int i = 0; i < 16; i += 4) {
    rows[i] = _mm512_unpacklo_epi64(half[i], half[i + 2]);
    rows[i + 1] = _mm512_unpackhi_epi64(half[i], half[i + 2]);
    rows[i + 2] = _mm512_unpacklo_epi64(half[i + 1], half[i + 3]);
    rows[i + 3] = _mm512_unpackhi_epi64(half[i + 1], half[i + 3]);
  }
  BURNISH_UNROLL
  for (int i = 0; i < 4; ++i) {
    const __m512i a = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0x88);
    const __m512i b = _mm512_shuffle_i32x4(rows[i], rows[i + 4], 0xdd);
    const __m512i c = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0x88);
    const __m512i d = _mm512_shuffle_i32x4(rows[i + 8], rows[i + 12], 0xdd);
    half[i] = _mm512_shuffle_i32x4(a, c, 0x88);
    half[i + 4] = _mm512_shuffle_i32x4(b, d, 0x88);
    half[i + 8] = _mm512_shuffle_i32x4(a, c, 0xdd);
    half[i + 12] = _mm512_shuffle_i32x4(b, d, 0xdd);
  }
  BURNISH_UNROLL
  for (int i = 0; i < 16; ++i) rows[i] = half[i];
}

// Sixteen numbers of one row and sixteen of the next, in turn.
BURNISH_INLINE __m512i paired(__m512i both) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, both);
}

BURNISH_INLINE __m256i half_line(const uint16_t* from) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
}

// Rows of one head, zeros past the last, one behind the other.
static void copy_rows(const uint16_t* from, int64_t stride, int rows, int padded, int dim, uint16_t* to) {
  for (int row = 0; row < rows; ++row) std::memcpy(to + static_cast<int64_t>(row) * dim, from + row * stride, 2u * dim);
  std::memset(to + static_cast<int64_t>(rows) * dim, 0, 2u * dim * (padded - rows));
}

// Right tiles whose columns are the rows given: [rows / 16][dim / 32] of [16 pairs of features][16 rows][2].
static void tiles_turned(const uint16_t* from, int64_t stride, int rows, int padded, int dim, uint16_t* to) {
  for (int row = 0; row < padded; row += kTileRows) {
    for (int e = 0; e < dim; e += 32) {
      __m512i lines[16];
      BURNISH_UNROLL
      for (int r = 0; r < 16; ++r) {
        lines[r] = row + r < rows ? _mm512_loadu_si512(from + (row + r) * stride + e) : _mm512_setzero_si512();
      }
      turn_square(lines);
      BURNISH_UNROLL
      for (int r = 0; r < 16; ++r) _mm512_storeu_si512(to + r * 32, lines[r]);
      to += kTileNumbers;
    }
  }
}

BURNISH_INLINE __m512i pair_at(const uint16_t* from, int64_t stride, int row, int rows) {
  const __m256i first = row < rows ? half_line(from + row * stride) : _mm256_setzero_si256();
  const __m256i second = row + 1 < rows ? half_line(from + (row + 1) * stride) : _mm256_setzero_si256();
  return paired(_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1));
}

// Right tiles whose rows are the rows given: [dim / 16][rows / 32] of [16 pairs of rows][16 features][2].
static void tiles_of_pairs(const uint16_t* from, int64_t stride, int rows, int padded, int dim, uint16_t* to) {
  for (int e = 0; e < dim; e += kLanes) {
    for (int row = 0; row < padded; row += 2) {
      _mm512_storeu_si512(to, pair_at(from + e, stride, row, rows));
      to += 32;
    }
  }
}

// Left tiles of the rows given, turned: [dim / 16][kTileQueries / 32] of [16 features][32 rows].
static void left_tiles_turned(const uint16_t* from, int64_t stride, int rows, int padded, int dim, uint16_t* to) {
  for (int e = 0; e < dim; e += kLanes) {
    for (int row = 0; row < padded; row += 32) {
      __m512i lines[16];
      BURNISH_UNROLL
      for (int r = 0; r < 16; ++r) lines[r] = pair_at(from + e, stride, row + 2 * r, rows);
      turn_square(lines);
      BURNISH_UNROLL
      for (int r = 0; r < 16; ++r) _mm512_storeu_si512(to + row / 32 * kTileNumbers + r * 32, lines[r]);
    }
    to += kTileQueries / 32 * kTileNumbers;
  }
}

// rows of one head = from[dim][stride] float32 turned.
static void narrow_turned(const float* from, int64_t from_stride, int rows, int dim, uint16_t* to, int64_t stride) {
  for (int row = 0; row < rows; row += 16) {
    const int count = rows - row < 16 ? rows - row : 16;
    for (int e = 0; e < dim; e += 16) {
      __m512i lines[16];
      BURNISH_UNROLL
      for (int r = 0; r < 16; ++r) lines[r] = _mm512_loadu_si512(from + (e + r) * from_stride + row);
      turn_square(lines);
      for (int r = 0; r < count; ++r) put(to + (row + r) * stride + e, (F16)lines[r]);
    }
  }
}
