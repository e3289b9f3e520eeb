// Everything that is not a product of matrices, and the frame of those that are. Included once per instruction set,
// inside a namespace of its own, after `Micro` is defined there:
//
//   struct Micro {
//     static constexpr int rows, panels;   // the largest tile of outputs: rows x (panels of 16)
//     // acc[row * P + panel] += sum over k of (w[k] unsigned) * a[k]; k counts from k_begin to k_end, multiples of 8
//     template <int R, int P> static void dot_int8(const uint8_t* w, size_t panel_bytes, const int8_t* const* a,
//                                                  int k_begin, int k_end, I16* acc);
//     template <int R, int P> static void dot_int4(...same...);
//   };

// ---- products ------------------------------------------------------------------------------------------------------

// Hands P panels of one row's results on, as `output` asks.
template <int P>
BURNISH_INLINE void finish_row(const Linear& linear, const Output& output, int row, int panel, F16* y) {
  if (linear.bias != nullptr) {
    BURNISH_UNROLL
    for (int p = 0; p < P; ++p) y[p] += load(linear.bias + (panel + p) * kLanes);
  }
  if (output.finish == kGate) {
    BURNISH_UNROLL
    for (int p = 0; p < P; p += 2) {
      float* to = output.data + row * output.stride + (panel + p) / 2 * kLanes;
      store(to, activate(output.activation, y[p]) * y[p + 1]);
    }
    return;
  }
  if (output.softcap != 0.0f) {
    BURNISH_UNROLL
    for (int p = 0; p < P; ++p) y[p] = tanh_of(y[p] / output.softcap) * output.softcap;
  }
  if (output.finish == kArgMax) {
    Best& best = output.best[row];
    BURNISH_UNROLL
    for (int p = 0; p < P; ++p) {
      const int first = (panel + p) * kLanes;
      const int count = linear.n - first < kLanes ? linear.n - first : kLanes;
      // Hardly ever is there anything new to note.
      if (best.index >= 0 && !any((y[p] > best.value) | (y[p] != y[p]))) continue;
      for (int lane = 0; lane < count; ++lane) {
        const float value = y[p][lane];
        if (value != value) best.index = -2;
        if (best.index != -2 && (best.index == -1 || value > best.value)) best = {value, first + lane};
      }
    }
    return;
  }
  BURNISH_UNROLL
  for (int p = 0; p < P; ++p) {
    const int first = (panel + p) * kLanes;
    float* to = output.data + row * output.stride + first;
    if (output.finish == kActivate) y[p] = activate(output.activation, y[p]);
    if (linear.n - first >= kLanes) {
      store(to, output.finish == kAdd ? load(to) + y[p] : y[p]);
    } else {
      for (int lane = 0; lane < linear.n - first; ++lane) to[lane] = output.finish == kAdd ? to[lane] + y[p][lane] : y[p][lane];
    }
  }
}

template <int R, int P>
static void tile_f32(const Linear& linear, Rows x, int row, int panel, const Output& output) {
  const size_t panel_size = static_cast<size_t>(linear.k_padded) * kLanes;
  const float* w = static_cast<const float*>(linear.weight) + panel * panel_size;
  const float* a = static_cast<const float*>(x.data) + static_cast<size_t>(row) * linear.k_padded;
  F16 acc[R * P] = {};
  for (int k = 0; k < linear.k; ++k) {
    F16 weights[P];
    BURNISH_UNROLL
    for (int p = 0; p < P; ++p) weights[p] = load(w + p * panel_size + static_cast<size_t>(k) * kLanes);
    BURNISH_UNROLL
    for (int r = 0; r < R; ++r) {
      const F16 value = splat(a[static_cast<size_t>(r) * linear.k_padded + k]);
      BURNISH_UNROLL
      for (int p = 0; p < P; ++p) acc[r * P + p] += value * weights[p];
    }
  }
  BURNISH_UNROLL
  for (int r = 0; r < R; ++r) finish_row<P>(linear, output, row + r, panel, acc + r * P);
}

template <int R, int P>
static void tile_bf16(const Linear& linear, Rows x, int row, int panel, const Output& output) {
  const size_t panel_size = static_cast<size_t>(linear.k_padded) * kLanes;
  const uint16_t* w = static_cast<const uint16_t*>(linear.weight) + panel * panel_size;
  const uint16_t* a = static_cast<const uint16_t*>(x.data) + static_cast<size_t>(row) * linear.k_padded;
  F16 acc[R * P] = {};
  for (int k = 0; k < linear.k_padded; k += 2) {
    F16 even[P], odd[P];
    BURNISH_UNROLL
    for (int p = 0; p < P; ++p) {
      U16 pairs;
      std::memcpy(&pairs, w + p * panel_size + static_cast<size_t>(k) * kLanes, 64);
      even[p] = (F16)(pairs << 16);
      odd[p] = (F16)(pairs & 0xffff0000u);
    }
    BURNISH_UNROLL
    for (int r = 0; r < R; ++r) {
      const F16 first = splat(bf16_to_float(a[static_cast<size_t>(r) * linear.k_padded + k]));
      const F16 second = splat(bf16_to_float(a[static_cast<size_t>(r) * linear.k_padded + k + 1]));
      BURNISH_UNROLL
      for (int p = 0; p < P; ++p) acc[r * P + p] += first * even[p] + second * odd[p];
    }
  }
  BURNISH_UNROLL
  for (int r = 0; r < R; ++r) finish_row<P>(linear, output, row + r, panel, acc + r * P);
}

#if defined(__AVX512BF16__)
#define BURNISH_TILE_BF16 tile_bf16_dot
// Products of pairs in the processor's bfloat16 units: rounds as they do, which is not quite as float32 does.
template <int R, int P>
static void tile_bf16_dot(const Linear& linear, Rows x, int row, int panel, const Output& output) {
  const size_t panel_size = static_cast<size_t>(linear.k_padded) * kLanes;
  const uint16_t* w = static_cast<const uint16_t*>(linear.weight) + panel * panel_size;
  const uint16_t* a = static_cast<const uint16_t*>(x.data) + static_cast<size_t>(row) * linear.k_padded;
  __m512 acc[R * P];
  BURNISH_UNROLL
  for (int i = 0; i < R * P; ++i) acc[i] = _mm512_setzero_ps();
  for (int k = 0; k < linear.k_padded; k += 2) {
    __m512i weights[P];
    BURNISH_UNROLL
    for (int p = 0; p < P; ++p) weights[p] = _mm512_loadu_si512(w + p * panel_size + static_cast<size_t>(k) * kLanes);
    BURNISH_UNROLL
    for (int r = 0; r < R; ++r) {
      int32_t pair;
      std::memcpy(&pair, a + static_cast<size_t>(r) * linear.k_padded + k, 4);
      const __m512bh value = (__m512bh)_mm512_set1_epi32(pair);
      BURNISH_UNROLL
      for (int p = 0; p < P; ++p) acc[r * P + p] = _mm512_dpbf16_ps(acc[r * P + p], value, (__m512bh)weights[p]);
    }
  }
  BURNISH_UNROLL
  for (int r = 0; r < R; ++r) {
    F16 y[P];
    BURNISH_UNROLL
    for (int p = 0; p < P; ++p) y[p] = (F16)acc[r * P + p];
    finish_row<P>(linear, output, row + r, panel, y);
  }
}
#else
#define BURNISH_TILE_BF16 tile_bf16
#endif

template <int R, int P>
static void tile_int8(const Linear& linear, Rows x, int row, int panel, const Output& output) {
  const size_t panel_bytes = static_cast<size_t>(linear.k_padded) * kLanes;
  const int8_t* a[R];
  BURNISH_UNROLL
  for (int r = 0; r < R; ++r) a[r] = static_cast<const int8_t*>(x.data) + static_cast<size_t>(row + r) * linear.k_padded;
  I16 acc[R * P] = {};
  Micro::template dot_int8<R, P>(static_cast<const uint8_t*>(linear.weight) + panel * panel_bytes, panel_bytes, a, 0,
                                 linear.k_padded, acc);
  BURNISH_UNROLL
  for (int r = 0; r < R; ++r) {
    F16 y[P];
    BURNISH_UNROLL
    for (int p = 0; p < P; ++p) {
      const F16 centred = __builtin_convertvector(acc[r * P + p] - 128 * x.sums[row + r], F16);
      y[p] = centred * (load(linear.scale + (panel + p) * kLanes) * x.scale[row + r]);
    }
    finish_row<P>(linear, output, row + r, panel, y);
  }
}

template <int R, int P, bool Nibbles>
static void tile_grouped(const Linear& linear, Rows x, int row, int panel, const Output& output) {
  const size_t panel_bytes = static_cast<size_t>(linear.k_padded) * kLanes / (Nibbles ? 2 : 1);
  const uint8_t* w = static_cast<const uint8_t*>(linear.weight) + panel * panel_bytes;
  const int groups = linear.num_groups;
  const int8_t* a[R];
  BURNISH_UNROLL
  for (int r = 0; r < R; ++r) a[r] = static_cast<const int8_t*>(x.data) + static_cast<size_t>(row + r) * linear.k_padded;
  F16 total[R * P] = {};
  for (int group = 0; group < groups; ++group) {
    const int begin = group * linear.group;
    const int end = begin + linear.group < linear.k_padded ? begin + linear.group : linear.k_padded;
    I16 acc[R * P] = {};
    if (Nibbles) {
      Micro::template dot_int4<R, P>(w, panel_bytes, a, begin, end, acc);
    } else {
      Micro::template dot_int8<R, P>(w, panel_bytes, a, begin, end, acc);
    }
    BURNISH_UNROLL
    for (int p = 0; p < P; ++p) {
      const size_t at = (static_cast<size_t>(panel + p) * groups + group) * kLanes;
      __builtin_prefetch(linear.group_scale + at + 8 * kLanes);
      __builtin_prefetch(linear.group_zero + at + 8 * kLanes);
      const F16 scale = load_half(linear.group_scale + at);
      const F16 zero = load_uint8(linear.group_zero + at);
      BURNISH_UNROLL
      for (int r = 0; r < R; ++r) {
        const float sum = static_cast<float>(x.sums[static_cast<size_t>(row + r) * groups + group]);
        total[r * P + p] += (__builtin_convertvector(acc[r * P + p], F16) - zero * sum) * scale;
      }
    }
  }
  BURNISH_UNROLL
  for (int r = 0; r < R; ++r) {
    BURNISH_UNROLL
    for (int p = 0; p < P; ++p) total[r * P + p] *= x.scale[row + r];
    finish_row<P>(linear, output, row + r, panel, total + r * P);
  }
}

template <int R, int P>
BURNISH_INLINE void tile(const Linear& linear, Rows x, int row, int panel, const Output& output) {
  switch (linear.format) {
    case kF32:
      return tile_f32<R, P>(linear, x, row, panel, output);
    case kBf16:
      return BURNISH_TILE_BF16<R, P>(linear, x, row, panel, output);
    case kInt8:
      return tile_int8<R, P>(linear, x, row, panel, output);
    case kInt4:
      return tile_grouped<R, P, true>(linear, x, row, panel, output);
    default:
      return tile_grouped<R, P, false>(linear, x, row, panel, output);
  }
}

template <int P>
static void strip(const Linear& linear, Rows x, int rows, int panel, const Output& output) {
  // Grouped tiles hold two sets of sums.
  const bool grouped = linear.format == kInt4 || linear.format == kInt8G;
  const int most = grouped && Micro::rows > 3 ? 3 : Micro::rows;
  int row = 0;
  while (row < rows) {
    const int left = rows - row < most ? rows - row : most;
    if (left >= 6 && Micro::rows >= 6) {
      tile<Micro::rows >= 6 ? 6 : 1, P>(linear, x, row, panel, output);
      row += 6;
    } else if (left >= 4 && Micro::rows >= 4) {
      tile<Micro::rows >= 4 ? 4 : 1, P>(linear, x, row, panel, output);
      row += 4;
    } else if (left >= 3 && Micro::rows >= 3) {
      tile<Micro::rows >= 3 ? 3 : 1, P>(linear, x, row, panel, output);
      row += 3;
    } else if (left >= 2 && Micro::rows >= 2) {
      tile<Micro::rows >= 2 ? 2 : 1, P>(linear, x, row, panel, output);
      row += 2;
    } else {
      tile<1, P>(linear, x, row, panel, output);
      row += 1;
    }
  }
}

static void linear_rows(const Linear& linear, Rows x, int rows, int first_panel, int last_panel, const Output& output,
                        Scratch) {
  int panel = first_panel;
  if (Micro::panels >= 4) {
    for (; panel + 4 <= last_panel; panel += 4) strip<Micro::panels >= 4 ? 4 : 2>(linear, x, rows, panel, output);
  }
  for (; panel < last_panel; panel += 2) strip<2>(linear, x, rows, panel, output);
}

// ---- rows ----------------------------------------------------------------------------------------------------------

// Sums are of the integers, zero past k.
static void pack_row_int8(const Linear& linear, const float* x, int8_t* to, float* scale, int32_t* sums) {
  const int k = linear.k;
  uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int j = 0; j < k; ++j) {
    const uint32_t magnitude = float_to_bits(x[j]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  const float peak = bits_to_float(largest);
  // A row with a NaN or an infinity gives NaN everywhere; one of zeros (or nothing but subnormals) gives zeros.
  const bool finite = largest < 0x7f800000u;
  const float inverse = finite && peak > 1e-35f ? 127.0f / peak : 0.0f;
  *scale = !finite ? bits_to_float(0x7fc00000u) : (peak > 1e-35f ? peak / 127.0f : 0.0f);
  if (!finite) {
    std::memset(to, 0, linear.k_padded);
  } else {
#pragma omp simd
    for (int j = 0; j < k; ++j) to[j] = static_cast<int8_t>(round_to_int(x[j] * inverse));
    std::memset(to + k, 0, linear.k_padded - k);
  }
  for (int group = 0; group < linear.num_groups; ++group) {
    const int begin = group * linear.group;
    const int end = begin + linear.group < linear.k_padded ? begin + linear.group : linear.k_padded;
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int j = begin; j < end; ++j) sum += to[j];
    sums[group] = sum;
  }
}

static void pack_rows(const Linear& linear, const float* x, int64_t stride, int first, int rows, Rows to,
                      float* scratch) {
  const int k = linear.k, padded = linear.k_padded;
  for (int row = first; row < first + rows; ++row) {
    const float* from = x + (row - first) * stride;
    if (linear.order != nullptr) {
      for (int j = 0; j < k; ++j) scratch[j] = from[linear.order[j]];
      from = scratch;
    }
    if (linear.format == kF32) {
      float* out = static_cast<float*>(to.data) + static_cast<size_t>(row) * padded;
      std::memcpy(out, from, sizeof(float) * k);
      std::memset(out + k, 0, sizeof(float) * (padded - k));
    } else if (linear.format == kBf16) {
      uint16_t* out = static_cast<uint16_t*>(to.data) + static_cast<size_t>(row) * padded;
      int j = 0;
      for (; j + kLanes <= k; j += kLanes) store_bf16(out + j, load(from + j));
      for (; j < k; ++j) out[j] = float_to_bf16(from[j]);
      std::memset(out + k, 0, sizeof(uint16_t) * (padded - k));
    } else {
      pack_row_int8(linear, from, static_cast<int8_t*>(to.data) + static_cast<size_t>(row) * padded, to.scale + row,
                    to.sums + static_cast<size_t>(row) * linear.num_groups);
    }
  }
}

static void norm_row(const Norm& norm, const float* x, float* out) {
  const int width = norm.width;
  float mean = 0.0f, squares = 0.0f;
  if (norm.kind == 2) {
#pragma omp simd reduction(+ : mean)
    for (int j = 0; j < width; ++j) mean += x[j];
    mean /= width;
  }
#pragma omp simd reduction(+ : squares)
  for (int j = 0; j < width; ++j) squares += (x[j] - mean) * (x[j] - mean);
  const float factor = 1.0f / std::sqrt(squares / width + norm.eps);
  if (norm.kind == 2) {
#pragma omp simd
    for (int j = 0; j < width; ++j) out[j] = (x[j] - mean) * factor * norm.weight[j] + norm.bias[j];
  } else {
#pragma omp simd
    for (int j = 0; j < width; ++j) out[j] = x[j] * factor * norm.weight[j];
  }
}

static void rotate(float* head, const float* cos, const float* sin, int rotary_dim, bool interleaved) {
  const int half = rotary_dim / 2;
  if (interleaved) {
    for (int j = 0; j < half; ++j) {
      const float a = head[2 * j], b = head[2 * j + 1];
      head[2 * j] = a * cos[j] - b * sin[j];
      head[2 * j + 1] = b * cos[j] + a * sin[j];
    }
    return;
  }
#pragma omp simd
  for (int j = 0; j < half; ++j) {
    const float a = head[j], b = head[j + half];
    head[j] = a * cos[j] - b * sin[j];
    head[j + half] = b * cos[j] + a * sin[j];
  }
}

static void scale_row(float* x, float factor, int64_t count) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) x[j] *= factor;
}

static void add(const float* a, const float* b, float* out, int64_t count) {
#pragma omp simd
  for (int64_t j = 0; j < count; ++j) out[j] = a[j] + b[j];
}

static void adapt(const Adapter& adapter, const float* x, float* y, float* scratch) {
  for (int r = 0; r < adapter.rank; ++r) {
    const float* a = adapter.a + static_cast<size_t>(r) * adapter.in;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int j = 0; j < adapter.in; ++j) sum += a[j] * x[j];
    scratch[r] = sum;
  }
  for (int n = 0; n < adapter.out; ++n) {
    const float* b = adapter.b + static_cast<size_t>(n) * adapter.rank;
    float sum = 0.0f;
    for (int r = 0; r < adapter.rank; ++r) sum += b[r] * scratch[r];
    y[n] += sum;
  }
}

static void activate_rows(bool gated, int activation, const float* raw, float* out, int width) {
  for (int j = 0; j < width; j += kLanes) {
    const F16 x = activate(activation, load(raw + (gated ? 2 * j : j)));
    store(out + j, gated ? x * load(raw + 2 * j + kLanes) : x);
  }
}

// ---- attention -----------------------------------------------------------------------------------------------------

static int round_up(int value, int step) { return (value + step - 1) / step * step; }

static float int8_scale(const float* x, int count, float* inverse) {
  float peak = 0.0f;
  bool finite = true;
  for (int j = 0; j < count; ++j) {
    const float magnitude = x[j] < 0 ? -x[j] : x[j];
    finite = finite && magnitude < bits_to_float(0x7f800000u);
    peak = magnitude > peak ? magnitude : peak;
  }
  *inverse = finite && peak > 1e-35f ? 127.0f / peak : 0.0f;
  return !finite ? bits_to_float(0x7fc00000u) : peak / 127.0f;
}

// Keys of a block stand feature by feature, so that sixteen tokens' scores are made at once.
static void store_key(int format, const float* key, int head_dim, void* block, float* scale, int place) {
  if (format == kF32) {
    float* to = static_cast<float*>(block) + place;
    for (int e = 0; e < head_dim; ++e) to[e * kBlockSize] = key[e];
  } else if (format == kBf16) {
    uint16_t* to = static_cast<uint16_t*>(block) + place * 2;
    for (int e = 0; e < head_dim; ++e) to[e / 2 * 2 * kBlockSize + e % 2] = float_to_bf16(key[e]);
  } else {
    int8_t* to = static_cast<int8_t*>(block) + place;
    float inverse;
    scale[place] = int8_scale(key, head_dim, &inverse);
    for (int e = 0; e < head_dim; ++e) to[e * kBlockSize] = inverse == 0.0f ? 0 : static_cast<int8_t>(round_to_int(key[e] * inverse));
  }
}

static void store_value(int format, const float* value, int head_dim, void* block, float* scale, int place) {
  const size_t width = round_up(head_dim, kLanes);
  if (format == kF32) {
    std::memcpy(static_cast<float*>(block) + place * width, value, sizeof(float) * head_dim);
  } else if (format == kBf16) {
    uint16_t* to = static_cast<uint16_t*>(block) + place / 2 * 2 * kLanes + place % 2;
    for (int e = 0; e < head_dim; ++e) to[e / kLanes * kBlockSize * kLanes + e % kLanes * 2] = float_to_bf16(value[e]);
  } else {
    int8_t* to = static_cast<int8_t*>(block) + place * width;
    float inverse;
    scale[place] = int8_scale(value, head_dim, &inverse);
    for (int e = 0; e < head_dim; ++e) to[e] = inverse == 0.0f ? 0 : static_cast<int8_t>(round_to_int(value[e] * inverse));
  }
}

BURNISH_INLINE F16 load_lanes(const float* from) { return load(from); }
BURNISH_INLINE F16 load_lanes(const int8_t* from) { return load_int8(from); }

// Sixteen lanes of a row's even and of its odd numbers, which stand in pairs.
BURNISH_INLINE void load_pairs(const uint16_t* from, F16* even, F16* odd) {
  U16 pairs;
  std::memcpy(&pairs, from, 64);
  *even = (F16)(pairs << 16);
  *odd = (F16)(pairs & 0xffff0000u);
}

// acc[r] += sum over d of a[r][d] * lanes(b, d): rows of b are `b_stride` apart, pairs of rows in bfloat16 twice that.
// `depth` is even in bfloat16.
template <int R>
BURNISH_INLINE void add_products(const float* a, int64_t a_stride, const uint16_t* b, int64_t b_stride, int depth,
                                 F16* acc) {
  for (int d = 0; d < depth; d += 2) {
    F16 even, odd;
    load_pairs(b + d * b_stride, &even, &odd);
    BURNISH_UNROLL
    for (int r = 0; r < R; ++r) acc[r] += splat(a[r * a_stride + d]) * even + splat(a[r * a_stride + d + 1]) * odd;
  }
}

template <int R, typename T>
BURNISH_INLINE void add_products(const float* a, int64_t a_stride, const T* b, int64_t b_stride, int depth, F16* acc) {
  for (int d = 0; d < depth; ++d) {
    const F16 lanes = load_lanes(b + d * b_stride);
    BURNISH_UNROLL
    for (int r = 0; r < R; ++r) acc[r] += splat(a[r * a_stride + d]) * lanes;
  }
}

template <typename T>
static void scores_of(const AttentionArgs& args, const float* q, int rows, int first_block, int last_block,
                      float* scores, int64_t stride) {
  const int dim = args.head_dim;
  for (int block = first_block; block < last_block; ++block) {
    const size_t slot = static_cast<size_t>(args.table[block]) * args.num_kv_heads + args.kv_head;
    const T* keys = static_cast<const T*>(args.keys) + slot * dim * kBlockSize;
    // Blocks lie scattered: the next keys and, for later, this block's values are asked for now.
    if (block + 2 < last_block) {
      const size_t next = static_cast<size_t>(args.table[block + 2]) * args.num_kv_heads + args.kv_head;
      prefetch(static_cast<const T*>(args.keys) + next * dim * kBlockSize, sizeof(T) * dim * kBlockSize);
    }
    const size_t value_size = static_cast<size_t>(round_up(dim, kLanes)) * kBlockSize;
    prefetch(static_cast<const T*>(args.values) + slot * value_size, sizeof(T) * value_size);
    float* to = scores + static_cast<int64_t>(block - first_block) * kBlockSize;
    int row = 0;
    for (; row + Micro::attention_rows <= rows; row += Micro::attention_rows) {
      F16 acc[Micro::attention_rows] = {};
      add_products<Micro::attention_rows>(q + row * dim, dim, keys, kBlockSize, dim, acc);
      BURNISH_UNROLL
      for (int r = 0; r < Micro::attention_rows; ++r) store(to + (row + r) * stride, acc[r]);
    }
    for (; row < rows; ++row) {
      F16 acc[1] = {};
      add_products<1>(q + row * dim, dim, keys, kBlockSize, dim, acc);
      store(to + row * stride, acc[0]);
    }
    if (args.key_scale != nullptr) {
      const F16 scale = load(args.key_scale + slot * kBlockSize);
      for (int r = 0; r < rows; ++r) store(to + r * stride, load(to + r * stride) * scale);
    }
  }
}

template <typename T>
static void values_of(const AttentionArgs& args, const float* weights, int64_t stride, int rows, int first_block,
                      int last_block, int last_count, float* const* out) {
  const int dim = args.head_dim;
  const int64_t width = round_up(dim, kLanes);
  for (int e = 0; e < dim; e += kLanes) {
    const int lanes = dim - e < kLanes ? dim - e : kLanes;
    for (int row = 0; row < rows;) {
      const int count = row + Micro::attention_rows <= rows ? Micro::attention_rows : 1;
      F16 acc[Micro::attention_rows] = {};
      for (int block = first_block; block < last_block; ++block) {
        const size_t slot = static_cast<size_t>(args.table[block]) * args.num_kv_heads + args.kv_head;
        // bfloat16 keeps sixteen features of all tokens together, the others a token's features.
        const bool pairs = sizeof(T) == 2;
        const T* values = static_cast<const T*>(args.values) + slot * width * kBlockSize + (pairs ? e * kBlockSize : e);
        const float* from = weights + row * stride + static_cast<int64_t>(block - first_block) * kBlockSize;
        const int depth = block + 1 == last_block ? last_count + (pairs ? last_count % 2 : 0) : kBlockSize;
        const int64_t step = pairs ? kLanes : width;
        if (count == 1) {
          add_products<1>(from, stride, values, step, depth, acc);
        } else {
          add_products<Micro::attention_rows>(from, stride, values, step, depth, acc);
        }
      }
      for (int r = 0; r < count; ++r) {
        if (lanes == kLanes) {
          store(out[row + r] + e, acc[r]);
        } else {
          for (int lane = 0; lane < lanes; ++lane) out[row + r][e + lane] = acc[r][lane];
        }
      }
      row += count;
    }
  }
}

static float alibi_at(const AttentionArgs& args, float slope, int position) {
  if (!args.alibi_bfloat16) return slope * static_cast<float>(position);
  const float rounded = bf16_to_float(float_to_bf16(static_cast<float>(position)));
  return bf16_to_float(float_to_bf16(bf16_to_float(float_to_bf16(slope)) * rounded));
}

// Soft cap and ALiBi on the scores begin .. end - 1 of one row: query at `position`, keys from token `origin` on.
static void bias_row(const AttentionArgs& args, float* scores, int origin, int begin, int end, int position, int head) {
  if (args.softcap != 0.0f) {
    for (int j = begin / kLanes * kLanes; j < end; j += kLanes)
      store(scores + j, tanh_of(load(scores + j) / args.softcap) * args.softcap);
  }
  if (args.alibi_slopes != nullptr) {
    const float slope = args.alibi_slopes[head];
    const float here = alibi_at(args, slope, position) * args.alibi_scale;
    for (int j = begin; j < end; ++j) scores[j] += alibi_at(args, slope, origin + j) * args.alibi_scale - here;
  }
}

// Scores of one row become weights, zero where it does not look.
static void softmax_row(const AttentionArgs& args, float* scores, int origin, int count, int position, int head) {
  const int padded = round_up(count, kLanes);
  int begin = args.window > 0 ? position - args.window + 1 - origin : 0;
  begin = begin < 0 ? 0 : begin;
  const int end = position + 1 - origin;
  bias_row(args, scores, origin, begin, end, position, head);
  const float lowest = bits_to_float(0xff800000u);
  for (int j = 0; j < begin; ++j) scores[j] = lowest;
  for (int j = end; j < padded; ++j) scores[j] = lowest;
  F16 peak = splat(lowest);
  for (int j = 0; j < padded; j += kLanes) peak = larger(load(scores + j), peak);
  float top = peak[0];
  for (int lane = 1; lane < kLanes; ++lane) top = peak[lane] > top ? peak[lane] : top;
  F16 total = {};
  for (int j = 0; j < padded; j += kLanes) {
    const F16 weight = exp_of(load(scores + j) - top);
    store(scores + j, weight);
    total += weight;
  }
  const float inverse = 1.0f / sum_of(total);
  for (int j = 0; j < padded; j += kLanes) store(scores + j, load(scores + j) * inverse);
}

template <typename T>
static void attend_with(const AttentionArgs& args, Scratch scratch) {
  const int dim = args.head_dim, group = args.num_heads / args.num_kv_heads;
  const int rows = args.num_rows * group;
  const int first = args.positions[args.first_row], last = args.positions[args.first_row + args.num_rows - 1];
  int lowest = args.window > 0 ? first - args.window + 1 : 0;
  lowest = lowest < 0 ? 0 : lowest;
  const int first_block = lowest / kBlockSize, last_block = last / kBlockSize + 1;
  const int origin = first_block * kBlockSize, count = last + 1 - origin;
  const int64_t stride = static_cast<int64_t>(last_block - first_block) * kBlockSize;
  float* q = reinterpret_cast<float*>(scratch.data);
  float* scores = q + round_up(rows * dim, kLanes);
  float* out[kMaxAttentionRows];
  for (int r = 0; r < rows; ++r) {
    const int token = args.first_row + r / group, head = args.kv_head * group + r % group;
    std::memcpy(q + r * dim, args.q + token * args.q_stride + static_cast<int64_t>(head) * dim, sizeof(float) * dim);
    out[r] = args.out + token * args.out_stride + static_cast<int64_t>(head) * dim;
  }
  scores_of<T>(args, q, rows, first_block, last_block, scores, stride);
  for (int r = 0; r < rows; ++r) {
    softmax_row(args, scores + r * stride, origin, count, args.positions[args.first_row + r / group],
                args.kv_head * group + r % group);
  }
  if (args.value_scale != nullptr) {
    for (int block = first_block; block < last_block; ++block) {
      const size_t slot = static_cast<size_t>(args.table[block]) * args.num_kv_heads + args.kv_head;
      const int tokens = block + 1 == last_block ? last % kBlockSize + 1 : kBlockSize;
      for (int r = 0; r < rows; ++r) {
        float* weights = scores + r * stride + static_cast<int64_t>(block - first_block) * kBlockSize;
        for (int t = 0; t < tokens; ++t) weights[t] *= args.value_scale[slot * kBlockSize + t];
      }
    }
  }
  values_of<T>(args, scores, stride, rows, first_block, last_block, last % kBlockSize + 1, out);
}

static void attend(int kv_format, const AttentionArgs& args, Scratch scratch) {
  if (kv_format == kF32) return attend_with<float>(args, scratch);
  if (kv_format == kBf16) return attend_with<uint16_t>(args, scratch);
  attend_with<int8_t>(args, scratch);
}
