// Causal attention in bfloat16 with matrix tiles, as in training_attention.inl otherwise. Included after it and after
// training_tile_layout.inl.
//
// Scores have queries for rows. The weights and their gradients are kept as left and as right factors, so that the
// gradients of keys and values come out turned, [E][T], and nothing of the size of the scores is ever turned.

// ---- products ------------------------------------------------------------------------------------------------------

// c[32][32] = (c +) a b over `steps` steps of 32: two left and two right tiles at a time.
BURNISH_INLINE void load_sums(float* c, int64_t stride, bool add) {
  if (!add) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    return;
  }
  _tile_loadd(0, c, stride * 4);
  _tile_loadd(1, c + 16, stride * 4);
  _tile_loadd(2, c + 16 * stride, stride * 4);
  _tile_loadd(3, c + 16 * stride + 16, stride * 4);
}

BURNISH_INLINE void multiply_tiles(const uint16_t* upper, const uint16_t* lower, int64_t a_stride, const uint16_t* left,
                                   const uint16_t* right) {
  _tile_loadd(4, upper, a_stride * 2);
  _tile_loadd(6, left, kTileBytes);
  _tile_loadd(7, right, kTileBytes);
  _tile_loadd(5, lower, a_stride * 2);
  _tile_dpbf16ps(0, 4, 6);
  _tile_dpbf16ps(1, 4, 7);
  _tile_dpbf16ps(2, 5, 6);
  _tile_dpbf16ps(3, 5, 7);
}

BURNISH_INLINE void store_sums(float* c, int64_t stride) {
  _tile_stored(0, c, stride * 4);
  _tile_stored(1, c + 16, stride * 4);
  _tile_stored(2, c + 16 * stride, stride * 4);
  _tile_stored(3, c + 16 * stride + 16, stride * 4);
}

// scores[32][keys first .. last - 1 of a piece] = rows of 32 queries times tiles of turned keys; multiples of 32.
static void tile_scores(const uint16_t* rows, const uint16_t* turned, int dim, int first, int last, float* scores) {
  const int steps = dim / 32;
  for (int key = first; key < last; key += 32) {
    const uint16_t* left = turned + static_cast<int64_t>(key / 16) * steps * kTileNumbers;
    load_sums(scores, 0, false);
    for (int step = 0; step < steps; ++step) {
      multiply_tiles(rows + step * 32, rows + 16 * dim + step * 32, dim, left + step * kTileNumbers,
                     left + (steps + step) * kTileNumbers);
    }
    store_sums(scores + key, kScoreStride);
  }
}

// sums[32][dim] += weights[32][first .. last - 1] times rows of keys or values, `at` being the piece's first; `tall`:
// steps of 32 rows in the whole of `pairs`.
static void tile_sums(const uint16_t* weights, const uint16_t* pairs, int64_t tall, int64_t at, int dim, int first,
                      int last, float* sums) {
  for (int e = 0; e < dim; e += 32) {
    const uint16_t* left = pairs + (e / 16 * tall + at / 32) * kTileNumbers;
    load_sums(sums + e, dim, true);
    for (int key = first; key < last; key += 32) {
      multiply_tiles(weights + key, weights + 16 * kWeightStride + key, kWeightStride, left + key / 32 * kTileNumbers,
                     left + (tall + key / 32) * kTileNumbers);
    }
    store_sums(sums + e, dim);
  }
}

// ---- forward -------------------------------------------------------------------------------------------------------

static bool fits_tiles(const AttentionPass& pass) { return pass.format == kBf16 && pass.head_dim % 32 == 0; }

struct TileMemory {
  TileMemory(const AttentionPass& pass, int length, bool backward, char* data) : carver(data) {
    const int64_t dim = pass.head_dim;
    // A piece may begin anywhere: the first key that is seen.
    keys = up_to(length, 32);
    turned_keys = carver.take<uint16_t>(keys * dim);
    pairs = carver.take<uint16_t>(keys * dim);
    rows = carver.take<uint16_t>(kTileQueries * dim);
    sums = carver.take<float>(kTileQueries * dim);
    scores = carver.take<float>(kTileBlock * kScoreStride);
    weights = carver.take<uint16_t>(kTileBlock * kWeightStride);
    if (!backward) return;
    turned_values = carver.take<uint16_t>(keys * dim);
    grad_rows = carver.take<uint16_t>(kTileQueries * dim);
    turned_rows = carver.take<uint16_t>(kTileQueries * dim);
    turned_grad_rows = carver.take<uint16_t>(kTileQueries * dim);
    grad_scores = carver.take<float>(kTileBlock * kScoreStride);
    weight_pairs = carver.take<uint16_t>(kTileQueries * kKeyPiece);
    grad_pairs = carver.take<uint16_t>(kTileQueries * kKeyPiece);
    stride = keys + kLanes;
    grad_keys = carver.take<float>(dim * stride);
    grad_values = carver.take<float>(dim * stride);
  }

  Carver carver;
  int64_t keys, stride;
  uint16_t *turned_keys, *turned_values, *pairs, *rows, *grad_rows, *turned_rows, *turned_grad_rows;
  uint16_t *weights, *weight_pairs, *grad_pairs;
  float *sums, *scores, *grad_scores, *grad_keys, *grad_values;
};

static void attend_tiles(const AttentionPass& pass, const AttentionItem& item, char* scratch) {
  const Tiles tiles;
  const TileMemory use(pass, item.length, false, scratch);
  const int dim = pass.head_dim, group = pass.num_heads / pass.num_kv_heads, steps = dim / 32;
  const int first_key = first_seen(pass, item.first), keys = item.last - first_key;
  const int padded_keys = static_cast<int>(up_to(keys, 32));
  const int64_t row = item.begin + first_key;
  tiles_turned(head_of<uint16_t>(pass.k, pass.k_stride, row, item.kv_head, dim), pass.k_stride, keys, padded_keys, dim,
               use.turned_keys);
  tiles_of_pairs(head_of<uint16_t>(pass.v, pass.v_stride, row, item.kv_head, dim), pass.v_stride, keys, padded_keys,
                 dim, use.pairs);
  for (int member = 0; member < group; ++member) {
    const int head = item.kv_head * group + member;
    const float slope = pass.slopes == nullptr ? 0.0f : pass.slopes[head];
    for (int from = item.first; from < item.last; from += kTileBlock) {
      const int rows = item.last - from < kTileBlock ? item.last - from : kTileBlock;
      float peak[kTileBlock], total[kTileBlock] = {};
      for (float& value : peak) value = bits_to_float(0xff800000u);
      copy_rows(head_of<uint16_t>(pass.q, pass.q_stride, item.begin + from, head, dim), pass.q_stride, rows, kTileBlock,
                dim, use.rows);
      std::memset(use.sums, 0, sizeof(float) * kTileBlock * dim);
      for (int origin = first_key + (first_seen(pass, from) - first_key) / 32 * 32; origin < from + rows;
           origin += kKeyPiece) {
        const int count = from + rows - origin < kKeyPiece ? from + rows - origin : kKeyPiece;
        const int padded = static_cast<int>(up_to(count, 32));
        const int64_t at = origin - first_key;
        tile_scores(use.rows, use.turned_keys + at / 16 * steps * kTileNumbers, dim, 0, padded, use.scores);
        for (int r = 0; r < rows; ++r) {
          const Sight sight = sight_of(pass, from + r, origin, count);
          const float factor = soften(pass, use.scores + r * kScoreStride, use.weights + r * kWeightStride, padded,
                                      sight, slope, origin - from - r, peak + r, total + r);
          if (factor == 1.0f) continue;
          float* sums = use.sums + r * dim;
          for (int e = 0; e < dim; e += kLanes) store(sums + e, load(sums + e) * factor);
        }
        for (int r = rows; r < kTileBlock; ++r) std::memset(use.weights + r * kWeightStride, 0, 2u * padded);
        tile_sums(use.weights, use.pairs, padded_keys / 32, at, dim, 0, padded, use.sums);
      }
      for (int r = 0; r < rows; ++r) {
        const int64_t place = item.begin + from + r;
        pass.lse[place * pass.num_heads + head] = peak[r] + std::log(total[r]);
        uint16_t* out = head_of<uint16_t>(pass.out, pass.out_stride, place, head, dim);
        const float inverse = 1.0f / total[r];
        for (int e = 0; e < dim; e += kLanes) put(out + e, load(use.sums + r * dim + e) * inverse);
      }
    }
  }
}

// ---- backward ------------------------------------------------------------------------------------------------------

// What the weights of 32 queries and a piece of the keys came to: places first .. last - 1, multiples of 32.
struct Range {
  int first, last;
};

// From scores and gradients of the weights to weights and gradients of the scores, for two queries at a time.
static void weigh_pair(const AttentionPass& pass, const TileMemory& use, int r, Range range, const Sight* sight,
                       const float* lse, const float* delta, float slope, int distance, uint16_t* weight_pairs,
                       uint16_t* grad_pairs) {
  for (int key = range.first; key < range.last; key += kLanes) {
    F16 weight[2], grad[2];
    BURNISH_UNROLL
    for (int i = 0; i < 2; ++i) {
      const F16 x = finished_scores(pass, use.scores + (r + i) * kScoreStride, key, sight[i], slope, distance - i);
      weight[i] = exp_below(x - lse[i]);
      grad[i] = weight[i] * (load(use.grad_scores + (r + i) * kScoreStride + key) - delta[i]) * pass.scale;
    }
    const __m512i weights = (__m512i)_mm512_cvtne2ps_pbh((__m512)weight[1], (__m512)weight[0]);
    const __m512i grads = (__m512i)_mm512_cvtne2ps_pbh((__m512)grad[1], (__m512)grad[0]);
    const int64_t tile = static_cast<int64_t>(key / 16) * kTileNumbers + r * 16;
    _mm512_storeu_si512(weight_pairs + tile, paired(weights));
    _mm512_storeu_si512(grad_pairs + tile, paired(grads));
    uint16_t* plain = use.weights + r * kWeightStride + key;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(plain), _mm512_castsi512_si256(grads));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(plain + kWeightStride), _mm512_extracti64x4_epi64(grads, 1));
  }
}

// to[dim][keys of a piece] += turned rows of the queries times `pairs` of their weights.
static void add_turned(const uint16_t* turned_rows, const uint16_t* pairs, int blocks, const Range* ranges, int dim,
                       float* to, int64_t stride) {
  for (int key = 0; key < kKeyPiece; key += 32) {
    int first = blocks, last = 0;
    for (int block = 0; block < blocks; ++block) {
      if (key < ranges[block].first || key >= ranges[block].last) continue;
      first = block < first ? block : first;
      last = block + 1;
    }
    if (first >= last) continue;
    for (int e = 0; e < dim; e += 32) {
      float* c = to + e * stride + key;
      load_sums(c, stride, true);
      for (int block = first; block < last; ++block) {
        const uint16_t* upper = turned_rows + (e / 16 * (kTileQueries / 32) + block) * static_cast<int64_t>(kTileNumbers);
        const uint16_t* left = pairs + (block * kPieceTiles + key / 16) * static_cast<int64_t>(kTileNumbers);
        multiply_tiles(upper, upper + kTileQueries / 32 * kTileNumbers, 32, left, left + kTileNumbers);
      }
      store_sums(c, stride);
    }
  }
}

static void attend_tiles_backward(const AttentionPass& pass, const AttentionItem& item, char* scratch) {
  const Tiles tiles;
  const TileMemory use(pass, item.length, true, scratch);
  const int dim = pass.head_dim, group = pass.num_heads / pass.num_kv_heads, steps = dim / 32, length = item.length;
  const int padded_keys = static_cast<int>(use.keys);
  const uint16_t* k = head_of<uint16_t>(pass.k, pass.k_stride, item.begin, item.kv_head, dim);
  const uint16_t* v = head_of<uint16_t>(pass.v, pass.v_stride, item.begin, item.kv_head, dim);
  tiles_turned(k, pass.k_stride, length, padded_keys, dim, use.turned_keys);
  tiles_turned(v, pass.v_stride, length, padded_keys, dim, use.turned_values);
  tiles_of_pairs(k, pass.k_stride, length, padded_keys, dim, use.pairs);
  std::memset(use.grad_keys, 0, sizeof(float) * dim * use.stride);
  std::memset(use.grad_values, 0, sizeof(float) * dim * use.stride);
  for (int member = 0; member < group; ++member) {
    const int head = item.kv_head * group + member;
    const float slope = pass.slopes == nullptr ? 0.0f : pass.slopes[head];
    for (int from = 0; from < length; from += kTileQueries) {
      const int rows = length - from < kTileQueries ? length - from : kTileQueries;
      const int64_t row = item.begin + from;
      const uint16_t* q = head_of<uint16_t>(pass.q, pass.q_stride, row, head, dim);
      const uint16_t* grad_out = head_of<uint16_t>(pass.grad_out, pass.grad_out_stride, row, head, dim);
      const int padded = static_cast<int>(up_to(rows, kTileBlock));
      copy_rows(q, pass.q_stride, rows, padded, dim, use.rows);
      copy_rows(grad_out, pass.grad_out_stride, rows, padded, dim, use.grad_rows);
      left_tiles_turned(q, pass.q_stride, rows, padded, dim, use.turned_rows);
      left_tiles_turned(grad_out, pass.grad_out_stride, rows, padded, dim, use.turned_grad_rows);
      float lse[kTileQueries] = {}, delta[kTileQueries] = {};
      for (int r = 0; r < rows; ++r) {
        lse[r] = pass.lse[(row + r) * pass.num_heads + head];
        delta[r] = delta_of(grad_out + r * pass.grad_out_stride,
                            head_of<uint16_t>(pass.out, pass.out_stride, row + r, head, dim), dim);
      }
      std::memset(use.sums, 0, sizeof(float) * padded * dim);
      const int blocks = (rows + kTileBlock - 1) / kTileBlock;
      for (int origin = first_seen(pass, from) / 32 * 32; origin < from + rows; origin += kKeyPiece) {
        Range ranges[kTileQueries / kTileBlock];
        const int64_t turned_at = static_cast<int64_t>(origin / 16) * steps * kTileNumbers;
        for (int block = 0; block < blocks; ++block) {
          const int begin = block * kTileBlock, end = begin + kTileBlock < rows ? begin + kTileBlock : rows;
          const int count = from + end - origin < kKeyPiece ? from + end - origin : kKeyPiece;
          const int seen = first_seen(pass, from + begin) - origin;
          Range& range = ranges[block];
          range = {seen <= 0 ? 0 : seen / 32 * 32, count <= 0 ? 0 : static_cast<int>(up_to(count, 32))};
          if (range.first >= range.last) continue;
          tile_scores(use.rows + begin * dim, use.turned_keys + turned_at, dim, range.first, range.last, use.scores);
          tile_scores(use.grad_rows + begin * dim, use.turned_values + turned_at, dim, range.first, range.last,
                      use.grad_scores);
          const int64_t pairs_at = static_cast<int64_t>(block) * kPieceTiles * kTileNumbers;
          for (int r = 0; r < kTileBlock; r += 2) {
            Sight sight[2];
            for (int i = 0; i < 2; ++i) {
              const int query = begin + r + i;
              sight[i] = query < rows ? sight_of(pass, from + query, origin, count) : Sight{0, 0};
            }
            weigh_pair(pass, use, r, range, sight, lse + begin + r, delta + begin + r, slope,
                       origin - from - begin - r, use.weight_pairs + pairs_at, use.grad_pairs + pairs_at);
          }
          tile_sums(use.weights, use.pairs, padded_keys / 32, origin, dim, range.first, range.last,
                    use.sums + begin * dim);
        }
        add_turned(use.turned_rows, use.grad_pairs, blocks, ranges, dim, use.grad_keys + origin, use.stride);
        add_turned(use.turned_grad_rows, use.weight_pairs, blocks, ranges, dim, use.grad_values + origin, use.stride);
      }
      narrow_rows(use.sums, dim, rows, dim, head_of<uint16_t>(pass.grad_q, pass.grad_q_stride, row, head, dim),
                  pass.grad_q_stride);
    }
  }
  narrow_turned(use.grad_keys, use.stride, length, dim,
                head_of<uint16_t>(pass.grad_k, pass.grad_k_stride, item.begin, item.kv_head, dim), pass.grad_k_stride);
  narrow_turned(use.grad_values, use.stride, length, dim,
                head_of<uint16_t>(pass.grad_v, pass.grad_v_stride, item.begin, item.kv_head, dim), pass.grad_v_stride);
}

static size_t tiles_scratch(const AttentionPass& pass, int length, bool backward) {
  if (!fits_tiles(pass)) return lanes_scratch(pass, length, backward);
  return TileMemory(pass, length, backward, nullptr).carver.used();
}

static void attention_forward_tiles(const AttentionPass& pass, const AttentionItem& item, char* scratch) {
  if (!fits_tiles(pass)) return attention_forward(pass, item, scratch);
  attend_tiles(pass, item, scratch);
}

static void attention_backward_tiles(const AttentionPass& pass, const AttentionItem& item, char* scratch) {
  if (!fits_tiles(pass)) return attention_backward(pass, item, scratch);
  attend_tiles_backward(pass, item, scratch);
}
