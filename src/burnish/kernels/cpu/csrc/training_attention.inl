// Causal attention over sequences laid end to end, forward and backward, in float32. Included once per instruction set,
// after training_numbers.inl.
//
// Dao et al., 2022, arXiv:2205.14135, and 2023, arXiv:2307.08691: scores exist for a block of queries and a piece of
// the keys at a time; the backward pass makes them again from the rows' log-sum-exp.

constexpr int kQueryBlock = 32, kKeyPiece = 256;

constexpr int64_t up_to(int64_t value, int64_t step) { return (value + step - 1) / step * step; }

// ---- what a block of scores goes through ---------------------------------------------------------------------------

// The keys begin .. end - 1 of a piece that the query at `position` sees; the piece starts at `origin` and has `count`.
struct Sight {
  int begin, end;
};

BURNISH_INLINE Sight sight_of(const AttentionPass& pass, int position, int origin, int count) {
  const int begin = pass.window > 0 ? position - pass.window + 1 - origin : 0, end = position + 1 - origin;
  const int least = begin < 0 ? 0 : (begin > count ? count : begin);
  return {least, end < least ? least : (end > count ? count : end)};
}

// The first key that any query from `position` on sees.
BURNISH_INLINE int first_seen(const AttentionPass& pass, int position) {
  const int begin = pass.window > 0 ? position - pass.window + 1 : 0;
  return begin < 0 ? 0 : begin;
}

BURNISH_INLINE I16 lane_numbers() {
  return I16{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
}

// Sixteen scores from `from` on, scaled and biased, minus infinity out of sight.
BURNISH_INLINE F16 finished_scores(const AttentionPass& pass, const float* scores, int from, Sight sight, float slope,
                                   int distance) {
  F16 x = load(scores + from) * pass.scale;
  if (slope != 0.0f) x += __builtin_convertvector(lane_numbers() + (from + distance), F16) * slope;
  const int first = sight.begin - from, last = sight.end - from;
  if (first <= 0 && last >= kLanes) return x;
  const int least = first < 0 ? 0 : (first > kLanes ? kLanes : first);
  const int most = last < least ? least : (last > kLanes ? kLanes : last);
  return between(least, most, x, splat(bits_to_float(0xff800000u)));
}

// Scores of one query become weights relative to the running peak; `padded` of them are written, zero out of sight.
// Returns what earlier sums are to be multiplied by.
template <typename P>
static float soften(const AttentionPass& pass, float* scores, P* weights, int padded, Sight sight, float slope,
                    int distance, float* peak, float* total) {
  F16 most = splat(*peak);
  const int first = sight.begin / kLanes * kLanes;
  for (int j = first; j < sight.end; j += kLanes) {
    const F16 x = finished_scores(pass, scores, j, sight, slope, distance);
    store(scores + j, x);
    most = larger_of(x, most);
  }
  const float top = peak_of(most);
  // Nothing seen yet: any number will do.
  const float shift = top == bits_to_float(0xff800000u) ? 0.0f : top;
  F16 sum = {};
  for (int j = 0; j < first; j += kLanes) put(weights + j, F16{});
  int j = first;
  for (; j < sight.end; j += kLanes) {
    const F16 weight = exp_below(load(scores + j) - shift);
    put(weights + j, weight);
    sum += weight;
  }
  for (; j < padded; j += kLanes) put(weights + j, F16{});
  // The first piece finds sums of zero.
  const float factor = *peak == shift || *peak == bits_to_float(0xff800000u) ? 1.0f : exp_below(splat(*peak - shift))[0];
  *peak = top;
  *total = *total * factor + total_of(sum);
  return factor;
}

// delta = sum of grad_out * out for one row.
template <typename T>
BURNISH_INLINE float delta_of(const T* grad_out, const T* out, int dim) {
  F16 total = {};
  for (int e = 0; e < dim; e += kLanes) total += get(grad_out + e, dim - e) * get(out + e, dim - e);
  return total_of(total);
}

// ---- products in vectors -------------------------------------------------------------------------------------------

#if defined(__AVX512F__)
constexpr int kProductRows = 6, kProductPanels = 4;
#elif defined(__AVX2__)
constexpr int kProductRows = 3, kProductPanels = 2;
#else
constexpr int kProductRows = 2, kProductPanels = 1;
#endif

// a(r, k) = a[r * row + k * column]
struct Factor {
  const float* data;
  int64_t row, column;
};

template <int R, int P>
static void product_tile(Factor a, const float* b, int64_t b_row, int depth, float* c, int64_t c_row, bool add) {
  F16 acc[R * P];
  BURNISH_UNROLL
  for (int r = 0; r < R; ++r) {
    BURNISH_UNROLL
    for (int p = 0; p < P; ++p) acc[r * P + p] = add ? load(c + r * c_row + p * kLanes) : F16{};
  }
  for (int k = 0; k < depth; ++k) {
    F16 lanes[P];
    BURNISH_UNROLL
    for (int p = 0; p < P; ++p) lanes[p] = load(b + k * b_row + p * kLanes);
    BURNISH_UNROLL
    for (int r = 0; r < R; ++r) {
      const F16 value = splat(a.data[r * a.row + k * a.column]);
      BURNISH_UNROLL
      for (int p = 0; p < P; ++p) acc[r * P + p] += value * lanes[p];
    }
  }
  BURNISH_UNROLL
  for (int r = 0; r < R; ++r) {
    BURNISH_UNROLL
    for (int p = 0; p < P; ++p) store(c + r * c_row + p * kLanes, acc[r * P + p]);
  }
}

template <int P>
static void product_strip(int rows, Factor a, const float* b, int64_t b_row, int depth, float* c, int64_t c_row,
                          bool add) {
  int row = 0;
  for (; row + kProductRows <= rows; row += kProductRows) {
    product_tile<kProductRows, P>({a.data + row * a.row, a.row, a.column}, b, b_row, depth, c + row * c_row, c_row, add);
  }
  for (; row < rows; ++row) {
    product_tile<1, P>({a.data + row * a.row, a.row, a.column}, b, b_row, depth, c + row * c_row, c_row, add);
  }
}

// c[rows][width] = (c +) a b; b: [depth][width], width a multiple of 16.
static void product(int rows, int width, int depth, Factor a, const float* b, int64_t b_row, float* c, int64_t c_row,
                    bool add) {
  int at = 0;
  for (; at + kProductPanels * kLanes <= width; at += kProductPanels * kLanes) {
    product_strip<kProductPanels>(rows, a, b + at, b_row, depth, c + at, c_row, add);
  }
  for (; at < width; at += kLanes) product_strip<1>(rows, a, b + at, b_row, depth, c + at, c_row, add);
}

// ---- rows in and out -----------------------------------------------------------------------------------------------

// [rows][dim] of a head to float32 [rows][padded], zeros behind.
template <typename T>
static void widen_rows(const T* from, int64_t stride, int rows, int dim, float* to, int64_t padded) {
  for (int row = 0; row < rows; ++row) {
    for (int e = 0; e < padded; e += kLanes) {
      store(to + row * padded + e, dim > e ? get(from + row * stride + e, dim - e) : F16{});
    }
  }
}

// to[dim][stride] = from[rows][padded] turned, zeros from column `rows` on.
static void turn(const float* from, int64_t padded, int rows, int dim, float* to, int64_t stride) {
  for (int e = 0; e < dim; ++e) {
    float* line = to + e * stride;
    for (int row = 0; row < rows; ++row) line[row] = from[row * padded + e];
    for (int64_t row = rows; row < stride; ++row) line[row] = 0.0f;
  }
}

template <typename T>
static void narrow_rows(const float* from, int64_t padded, int rows, int dim, T* to, int64_t stride) {
  for (int row = 0; row < rows; ++row) {
    for (int e = 0; e < dim; e += kLanes) put(to + row * stride + e, load(from + row * padded + e), dim - e);
  }
}

// Pieces of scratch, each on a cache line's boundary and with a line to spare. Without memory it only counts.
class Carver {
 public:
  explicit Carver(char* data) : data_(data) {}
  template <typename T>
  T* take(int64_t count) {
    char* const start = data_ == nullptr ? nullptr : data_ + used_;
    used_ += up_to(count * sizeof(T), 64) + 64;
    return reinterpret_cast<T*>(start);
  }
  size_t used() const { return used_; }

 private:
  char* data_;
  size_t used_ = 0;
};

struct Lanes {
  Lanes(const AttentionPass& pass, int length, bool backward, char* data) : carver(data) {
    width = up_to(pass.head_dim, kLanes);
    keys = up_to(length, kLanes);
    turned_keys = carver.take<float>(pass.head_dim * keys);
    values = carver.take<float>(length * width);
    scores = carver.take<float>(kQueryBlock * kKeyPiece);
    q = carver.take<float>(kQueryBlock * width);
    sums = carver.take<float>(kQueryBlock * width);
    if (!backward) return;
    plain_keys = carver.take<float>(length * width);
    turned_values = carver.take<float>(pass.head_dim * keys);
    grad_out = carver.take<float>(kQueryBlock * width);
    grad_scores = carver.take<float>(kQueryBlock * kKeyPiece);
    grad_keys = carver.take<float>(length * width);
    grad_values = carver.take<float>(length * width);
  }

  Carver carver;
  int64_t width, keys;
  float *turned_keys, *values, *scores, *q, *sums;
  float *plain_keys, *turned_values, *grad_out, *grad_scores, *grad_keys, *grad_values;
};

static size_t lanes_scratch(const AttentionPass& pass, int length, bool backward) {
  return Lanes(pass, length, backward, nullptr).carver.used();
}

template <typename T>
BURNISH_INLINE T* head_of(const void* data, int64_t stride, int64_t row, int head, int dim) {
  return const_cast<T*>(static_cast<const T*>(data)) + row * stride + static_cast<int64_t>(head) * dim;
}

// ---- forward -------------------------------------------------------------------------------------------------------

template <typename T>
static void attend_lanes(const AttentionPass& pass, const AttentionItem& item, char* scratch) {
  const Lanes use(pass, item.length, false, scratch);
  const int dim = pass.head_dim, group = pass.num_heads / pass.num_kv_heads, end_key = item.last;
  // Keys before this are seen by none of the item's queries.
  const int first_key = first_seen(pass, item.first);
  widen_rows(head_of<T>(pass.k, pass.k_stride, item.begin + first_key, item.kv_head, dim), pass.k_stride,
             end_key - first_key, dim, use.values, use.width);
  turn(use.values, use.width, end_key - first_key, dim, use.turned_keys, use.keys);
  widen_rows(head_of<T>(pass.v, pass.v_stride, item.begin + first_key, item.kv_head, dim), pass.v_stride,
             end_key - first_key, dim, use.values, use.width);
  for (int member = 0; member < group; ++member) {
    const int head = item.kv_head * group + member;
    const float slope = pass.slopes == nullptr ? 0.0f : pass.slopes[head];
    for (int from = item.first; from < item.last; from += kQueryBlock) {
      const int rows = item.last - from < kQueryBlock ? item.last - from : kQueryBlock;
      float peak[kQueryBlock], total[kQueryBlock] = {};
      for (float& value : peak) value = bits_to_float(0xff800000u);
      widen_rows(head_of<T>(pass.q, pass.q_stride, item.begin + from, head, dim), pass.q_stride, rows, dim, use.q,
                 use.width);
      std::memset(use.sums, 0, sizeof(float) * rows * use.width);
      for (int origin = first_key + (first_seen(pass, from) - first_key) / kLanes * kLanes; origin < from + rows;
           origin += kKeyPiece) {
        const int count = from + rows - origin < kKeyPiece ? from + rows - origin : kKeyPiece;
        const int padded = static_cast<int>(up_to(count, kLanes));
        const int at = origin - first_key;
        product(rows, padded, dim, {use.q, use.width, 1}, use.turned_keys + at, use.keys, use.scores, kKeyPiece, false);
        for (int r = 0; r < rows; ++r) {
          float* line = use.scores + r * kKeyPiece;
          const Sight sight = sight_of(pass, from + r, origin, count);
          const float factor = soften(pass, line, line, padded, sight, slope, origin - from - r, peak + r, total + r);
          if (factor == 1.0f) continue;
          float* sums = use.sums + r * use.width;
          for (int e = 0; e < use.width; e += kLanes) store(sums + e, load(sums + e) * factor);
        }
        product(rows, static_cast<int>(use.width), count, {use.scores, kKeyPiece, 1}, use.values + at * use.width,
                use.width, use.sums, use.width, true);
      }
      for (int r = 0; r < rows; ++r) {
        const int64_t row = item.begin + from + r;
        pass.lse[row * pass.num_heads + head] = peak[r] + std::log(total[r]);
        T* out = head_of<T>(pass.out, pass.out_stride, row, head, dim);
        const float inverse = 1.0f / total[r];
        for (int e = 0; e < dim; e += kLanes) put(out + e, load(use.sums + r * use.width + e) * inverse, dim - e);
      }
    }
  }
}

// ---- backward ------------------------------------------------------------------------------------------------------

template <typename T>
static void attend_lanes_backward(const AttentionPass& pass, const AttentionItem& item, char* scratch) {
  const Lanes use(pass, item.length, true, scratch);
  const int dim = pass.head_dim, group = pass.num_heads / pass.num_kv_heads, length = item.length;
  const int width = static_cast<int>(use.width);
  widen_rows(head_of<T>(pass.k, pass.k_stride, item.begin, item.kv_head, dim), pass.k_stride, length, dim,
             use.plain_keys, width);
  turn(use.plain_keys, width, length, dim, use.turned_keys, use.keys);
  widen_rows(head_of<T>(pass.v, pass.v_stride, item.begin, item.kv_head, dim), pass.v_stride, length, dim, use.values,
             width);
  turn(use.values, width, length, dim, use.turned_values, use.keys);
  std::memset(use.grad_keys, 0, sizeof(float) * length * width);
  std::memset(use.grad_values, 0, sizeof(float) * length * width);
  for (int member = 0; member < group; ++member) {
    const int head = item.kv_head * group + member;
    const float slope = pass.slopes == nullptr ? 0.0f : pass.slopes[head];
    for (int from = 0; from < length; from += kQueryBlock) {
      const int rows = length - from < kQueryBlock ? length - from : kQueryBlock;
      widen_rows(head_of<T>(pass.q, pass.q_stride, item.begin + from, head, dim), pass.q_stride, rows, dim, use.q,
                 width);
      widen_rows(head_of<T>(pass.grad_out, pass.grad_out_stride, item.begin + from, head, dim), pass.grad_out_stride,
                 rows, dim, use.grad_out, width);
      float lse[kQueryBlock], delta[kQueryBlock];
      for (int r = 0; r < rows; ++r) {
        const int64_t row = item.begin + from + r;
        lse[r] = pass.lse[row * pass.num_heads + head];
        delta[r] = delta_of(head_of<T>(pass.grad_out, pass.grad_out_stride, row, head, dim),
                            head_of<T>(pass.out, pass.out_stride, row, head, dim), dim);
      }
      std::memset(use.sums, 0, sizeof(float) * rows * width);
      for (int origin = first_seen(pass, from) / kLanes * kLanes; origin < from + rows; origin += kKeyPiece) {
        const int count = from + rows - origin < kKeyPiece ? from + rows - origin : kKeyPiece;
        const int padded = static_cast<int>(up_to(count, kLanes));
        product(rows, padded, dim, {use.q, width, 1}, use.turned_keys + origin, use.keys, use.scores, kKeyPiece, false);
        product(rows, padded, dim, {use.grad_out, width, 1}, use.turned_values + origin, use.keys, use.grad_scores,
                kKeyPiece, false);
        for (int r = 0; r < rows; ++r) {
          const Sight sight = sight_of(pass, from + r, origin, count);
          float* scores = use.scores + r * kKeyPiece;
          float* grads = use.grad_scores + r * kKeyPiece;
          for (int j = 0; j < padded; j += kLanes) {
            const F16 x = finished_scores(pass, scores, j, sight, slope, origin - from - r);
            const F16 weight = exp_below(x - lse[r]);
            store(scores + j, weight);
            store(grads + j, weight * (load(grads + j) - delta[r]) * pass.scale);
          }
        }
        product(rows, width, count, {use.grad_scores, kKeyPiece, 1}, use.plain_keys + static_cast<int64_t>(origin) * width,
                width, use.sums, width, true);
        product(count, width, rows, {use.grad_scores, 1, kKeyPiece}, use.q, width,
                use.grad_keys + static_cast<int64_t>(origin) * width, width, true);
        product(count, width, rows, {use.scores, 1, kKeyPiece}, use.grad_out, width,
                use.grad_values + static_cast<int64_t>(origin) * width, width, true);
      }
      narrow_rows(use.sums, width, rows, dim, head_of<T>(pass.grad_q, pass.grad_q_stride, item.begin + from, head, dim),
                  pass.grad_q_stride);
    }
  }
  narrow_rows(use.grad_keys, width, length, dim,
              head_of<T>(pass.grad_k, pass.grad_k_stride, item.begin, item.kv_head, dim), pass.grad_k_stride);
  narrow_rows(use.grad_values, width, length, dim,
              head_of<T>(pass.grad_v, pass.grad_v_stride, item.begin, item.kv_head, dim), pass.grad_v_stride);
}

static void attention_forward(const AttentionPass& pass, const AttentionItem& item, char* scratch) {
  if (pass.format == kF32) return attend_lanes<float>(pass, item, scratch);
  attend_lanes<uint16_t>(pass, item, scratch);
}

static void attention_backward(const AttentionPass& pass, const AttentionItem& item, char* scratch) {
  if (pass.format == kF32) return attend_lanes_backward<float>(pass, item, scratch);
  attend_lanes_backward<uint16_t>(pass, item, scratch);
}
