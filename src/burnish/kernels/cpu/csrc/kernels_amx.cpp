// Intel's matrix tiles (AMX) for products of more rows than a few; the rest as with AVX-512.
//
// A tile is 16 rows of 64 bytes. Weights are packed so that 16 rows of a panel are one tile as they stand. Four tiles
// hold a block of 32 rows by 32 features; two hold activations, two hold weights. The int4 formats are widened a pair
// of panels at a time to int8 with one scale per feature: the rounding that adds is small beside int4's own.
#include "kernels.h"

#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cmath>
#include <cstring>
#include <initializer_list>

#include "lanes.h"
#include "tiles.h"

namespace burnish {
namespace amx {

#include "micro_avx512.h"
#include "portable.inl"

constexpr int kBlock = 32;
// Below this many rows the vector units keep up with memory, or with what widening costs. The latter also keeps the
// drafts of one request, and of two, on the units that round a group's weights only once.
constexpr int kFewestRows = 5, kFewestRowsGrouped = 20;

// How many steps before its use a tile of weights is asked for.
constexpr int kStepsAhead = 4;

BURNISH_INLINE void prefetch_tile(const char* tile) {
  // Hidden from the compiler, which would otherwise keep the address of every line in a register.
  __asm__("" : "+r"(tile));
  BURNISH_UNROLL
  for (size_t line = 0; line < kTileSize; line += kTileBytes) _mm_prefetch(tile + line, _MM_HINT_T0);
}

// One step of K: two tiles of weights times one or two of activations.
template <bool Floats, bool Two>
BURNISH_INLINE void multiply_step(const char* upper, const char* lower, size_t a_stride, const char* left,
                                  const char* right) {
  _tile_loadd(4, upper, a_stride);
  _tile_loadd(6, left, kTileBytes);
  _tile_loadd(7, right, kTileBytes);
  if (Two) _tile_loadd(5, lower, a_stride);
  if (Floats) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    if (Two) _tile_dpbf16ps(2, 5, 6);
    if (Two) _tile_dpbf16ps(3, 5, 7);
  } else {
    _tile_dpbsud(0, 4, 6);
    _tile_dpbsud(1, 4, 7);
    if (Two) _tile_dpbsud(2, 5, 6);
    if (Two) _tile_dpbsud(3, 5, 7);
  }
}

// acc: [32][32] int32 or float. a: one or two tiles' rows, `a_stride` bytes apart. b: two panels, `panel_bytes` apart:
// two streams are quicker than one. Weights that come from memory (`cold`) are asked for ahead.
template <bool Floats, bool Two>
static inline void multiply(const char* a, size_t a_stride, const char* b, size_t panel_bytes, int steps, bool cold,
                            void* acc) {
  const char* lower = a + kTileRows * a_stride;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int step = 0; step < steps; ++step) {
    const char* left = b + step * kTileSize;
    const char* right = left + panel_bytes;
    if (cold) {
      // Past the left panel's end stands the right one; past the right one's, the next pair.
      prefetch_tile(left + (step + kStepsAhead < steps ? 0 : panel_bytes) + kStepsAhead * kTileSize);
      prefetch_tile(right + (step + kStepsAhead < steps ? 0 : panel_bytes) + kStepsAhead * kTileSize);
    }
    multiply_step<Floats, Two>(a + step * kTileBytes, lower + step * kTileBytes, a_stride, left, right);
  }
  char* out = static_cast<char*>(acc);
  _tile_stored(0, out, kBlock * 4);
  _tile_stored(1, out + 64, kBlock * 4);
  if (Two) {
    _tile_stored(2, out + kTileRows * kBlock * 4, kBlock * 4);
    _tile_stored(3, out + kTileRows * kBlock * 4 + 64, kBlock * 4);
  }
}

template <bool Floats>
static inline void multiply_rows(int rows, const char* a, size_t a_stride, const char* b, size_t panel_bytes, int steps,
                                 bool cold, void* acc) {
  if (rows > kTileRows) {
    multiply<Floats, true>(a, a_stride, b, panel_bytes, steps, cold, acc);
  } else {
    multiply<Floats, false>(a, a_stride, b, panel_bytes, steps, cold, acc);
  }
}

static void finish_block_int(const Linear& linear, const float* scale, Rows x, int row, int rows, int panel,
                             const int32_t* acc, const Output& output) {
  const F16 left = load(scale + panel * kLanes), right = load(scale + (panel + 1) * kLanes);
  for (int r = 0; r < rows; ++r) {
    const float factor = x.scale[row + r];
    I16 a, b;
    std::memcpy(&a, acc + r * kBlock, 64);
    std::memcpy(&b, acc + r * kBlock + kLanes, 64);
    int32_t sum = 0;
    for (int group = 0; group < linear.num_groups; ++group) sum += x.sums[(row + r) * linear.num_groups + group];
    a -= 128 * sum;
    b -= 128 * sum;
    F16 y[2] = {__builtin_convertvector(a, F16) * (left * factor), __builtin_convertvector(b, F16) * (right * factor)};
    finish_row<2>(linear, output, row + r, panel, y);
  }
}

static void finish_block_float(const Linear& linear, int row, int rows, int panel, const float* acc,
                               const Output& output) {
  for (int r = 0; r < rows; ++r) {
    F16 y[2] = {load(acc + r * kBlock), load(acc + r * kBlock + kLanes)};
    finish_row<2>(linear, output, row + r, panel, y);
  }
}

// One panel's share of a pair: grouped weights as bytes w8 + 128 with w8 * requant_scale close to (w - zero) * scale.
static void widen_panel(const Linear& linear, int panel, uint8_t* to) {
  const bool nibbles = linear.format == kInt4;
  const size_t panel_bytes = static_cast<size_t>(linear.k_padded) * kLanes / (nibbles ? 2 : 1);
  const uint8_t* from = static_cast<const uint8_t*>(linear.weight) +
                        panel * panel_bytes;
  const F16 whole = load(linear.requant_scale + panel * kLanes);
  const __m512 inverse = (__m512)select(whole > 0.0f, 1.0f / whole, F16{});
  const __m512i low_bytes = _mm512_set1_epi32(255);
  for (int group = 0; group < linear.num_groups; ++group) {
    const int begin = group * linear.group;
    const int end = begin + linear.group < linear.k_padded ? begin + linear.group : linear.k_padded;
    const size_t at = (static_cast<size_t>(panel) * linear.num_groups + group) * kLanes;
    const __m512 ratio = (__m512)load_half(linear.group_scale + at) * inverse;
    const __m512i zero = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(linear.group_zero + at)));
    for (int k = begin; k < end; k += 4) {
      __m512i bytes;
      if (nibbles) {
        bytes = _mm512_loadu_si512(from + static_cast<size_t>(k / 8) * 64);
        if (k & 4) bytes = _mm512_srli_epi16(bytes, 4);
        bytes = _mm512_and_si512(bytes, _mm512_set1_epi8(15));
      } else {
        bytes = _mm512_loadu_si512(from + static_cast<size_t>(k) * kLanes);
      }
      __m512i joined = _mm512_setzero_si512();
      for (int i = 0; i < 4; ++i) {
        const __m512i w = _mm512_and_si512(_mm512_srli_epi32(bytes, 8 * i), low_bytes);
        const __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(_mm512_sub_epi32(w, zero)), ratio);
        const __m512i w8 = _mm512_add_epi32(_mm512_cvtps_epi32(y), _mm512_set1_epi32(128));
        joined = _mm512_or_si512(joined, _mm512_slli_epi32(_mm512_and_si512(w8, low_bytes), 8 * i));
      }
      _mm512_storeu_si512(to + static_cast<size_t>(k) * kLanes, joined);
    }
  }
}

static void linear_tiles(const Linear& linear, Rows x, int rows, int first_panel, int last_panel, const Output& output,
                         Scratch scratch) {
  const bool floats = linear.format == kBf16, grouped = linear.format == kInt4 || linear.format == kInt8G;
  if (rows < (grouped ? kFewestRowsGrouped : kFewestRows) || linear.format == kF32) {
    return linear_rows(linear, x, rows, first_panel, last_panel, output, scratch);
  }
  const size_t item = floats ? 2 : 1;
  const size_t a_stride = linear.k_padded * item, panel_bytes = static_cast<size_t>(linear.k_padded) * kLanes * item;
  const int steps = static_cast<int>(a_stride / kTileBytes);
  alignas(64) int32_t acc[kBlock * kBlock];
  for (int panel = first_panel; panel < last_panel; panel += 2) {
    const char* b = static_cast<const char*>(linear.weight) + panel * panel_bytes;
    if (grouped) {
      widen_panel(linear, panel, reinterpret_cast<uint8_t*>(scratch.data));
      widen_panel(linear, panel + 1, reinterpret_cast<uint8_t*>(scratch.data) + panel_bytes);
      b = scratch.data;
    }
    for (int row = 0; row < rows; row += kBlock) {
      const bool cold = row == 0 && !grouped;
      const int count = rows - row < kBlock ? rows - row : kBlock;
      const char* a = static_cast<const char*>(x.data) + row * a_stride;
      if (floats) {
        multiply_rows<true>(count, a, a_stride, b, panel_bytes, steps, cold, acc);
        finish_block_float(linear, row, count, panel, reinterpret_cast<const float*>(acc), output);
      } else {
        multiply_rows<false>(count, a, a_stride, b, panel_bytes, steps, cold, acc);
        finish_block_int(linear, grouped ? linear.requant_scale : linear.scale, x, row, count, panel, acc, output);
      }
    }
  }
}

static void linear_with_tiles(const Linear& linear, Rows x, int rows, int first_panel, int last_panel,
                              const Output& output, Scratch scratch) {
  const Tiles tiles;
  linear_tiles(linear, x, rows, first_panel, last_panel, output, scratch);
}

// ---- attention in bfloat16 ------------------------------------------------------------------------------------------

// Two tiles of queries meet two blocks of keys at a time; then the weights, rounded to bfloat16, meet 16 features of
// values each. A block's values fill half a tile's depth, which takes a configuration of its own.

static const TileConfig& value_config() {
  static const TileConfig config = [] {
    TileConfig made;
    for (const int a : {4, 5}) made.bytes[a] = kBlockSize * 2;
    for (const int b : {6, 7}) made.rows[b] = kBlockSize / 2;
    return made;
  }();
  return config;
}

// scores[rows][stride] = q keys' for the blocks first_block .. last_block - 1; q: [rows to 32][dim] bfloat16.
static void tile_scores(const AttentionArgs& args, const uint16_t* q, bool two, int first_block, int last_block,
                        float* scores, int64_t stride) {
  const int dim = args.head_dim, steps = dim / 32;
  const size_t key_size = static_cast<size_t>(dim) * kBlockSize, q_bytes = dim * 2u;
  const auto keys_of = [&](int block) {
    const size_t slot = static_cast<size_t>(args.table[block]) * args.num_kv_heads + args.kv_head;
    return static_cast<const uint16_t*>(args.keys) + slot * key_size;
  };
  for (int block = first_block; block < last_block; block += 2) {
    const bool pair = block + 1 < last_block;
    const uint16_t* left = keys_of(block);
    const uint16_t* right = pair ? keys_of(block + 1) : left;
    for (int later = block + 4; later < block + 6 && later < last_block; ++later) prefetch(keys_of(later), key_size * 2);
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int step = 0; step < steps; ++step) {
      _tile_loadd(4, q + step * 32, q_bytes);
      _tile_loadd(6, left + step * (kTileSize / 2), kTileBytes);
      _tile_loadd(7, right + step * (kTileSize / 2), kTileBytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (two) {
        _tile_loadd(5, q + kTileRows * dim + step * 32, q_bytes);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    float* to = scores + static_cast<int64_t>(block - first_block) * kBlockSize;
    _tile_stored(0, to, stride * 4);
    if (pair) _tile_stored(1, to + kBlockSize, stride * 4);
    if (two) {
      _tile_stored(2, to + kTileRows * stride, stride * 4);
      if (pair) _tile_stored(3, to + kTileRows * stride + kBlockSize, stride * 4);
    }
  }
}

// sums[32][dim] = weights values; weights: [rows to 32][stride] bfloat16.
static void tile_values(const AttentionArgs& args, const uint16_t* weights, int64_t stride, bool two, int first_block,
                        int last_block, float* sums) {
  const int dim = args.head_dim;
  const size_t value_size = static_cast<size_t>(dim) * kBlockSize, chunk = kBlockSize * kLanes;
  for (int e = 0; e < dim; e += 2 * kLanes) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int block = first_block; block < last_block; ++block) {
      const size_t slot = static_cast<size_t>(args.table[block]) * args.num_kv_heads + args.kv_head;
      const uint16_t* values = static_cast<const uint16_t*>(args.values) + slot * value_size + e / kLanes * chunk;
      const uint16_t* from = weights + static_cast<int64_t>(block - first_block) * kBlockSize;
      _tile_loadd(4, from, stride * 2);
      _tile_loadd(6, values, kTileBytes);
      _tile_loadd(7, values + chunk, kTileBytes);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      if (two) {
        _tile_loadd(5, from + kTileRows * stride, stride * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
    }
    _tile_stored(0, sums + e, dim * 4u);
    _tile_stored(1, sums + e + kLanes, dim * 4u);
    if (two) {
      _tile_stored(2, sums + kTileRows * dim + e, dim * 4u);
      _tile_stored(3, sums + kTileRows * dim + e + kLanes, dim * 4u);
    }
  }
}

// One row's scores to weights in bfloat16 (zero where it does not look), not yet divided by their sum, which it returns.
static float tile_softmax(float* scores, uint16_t* weights, int begin, int end, int64_t stride) {
  const float lowest = bits_to_float(0xff800000u);
  for (int j = 0; j < begin; ++j) scores[j] = lowest;
  for (int64_t j = end; j < stride; ++j) scores[j] = lowest;
  F16 peak = splat(lowest);
  for (int64_t j = 0; j < stride; j += kLanes) peak = larger(load(scores + j), peak);
  const float top = _mm512_reduce_max_ps((__m512)peak);
  F16 total = {};
  for (int64_t j = 0; j < stride; j += kLanes) {
    const F16 weight = exp_of(load(scores + j) - top);
    store_bf16(weights + j, weight);
    total += weight;
  }
  return _mm512_reduce_add_ps((__m512)total);
}

static void attend_bf16(const AttentionArgs& args, Scratch scratch) {
  const int dim = args.head_dim, group = args.num_heads / args.num_kv_heads;
  const int rows = args.num_rows * group;
  const int first = args.positions[args.first_row], last = args.positions[args.first_row + args.num_rows - 1];
  int lowest = args.window > 0 ? first - args.window + 1 : 0;
  lowest = lowest < 0 ? 0 : lowest;
  const int first_block = lowest / kBlockSize, last_block = last / kBlockSize + 1;
  const int origin = first_block * kBlockSize;
  const int64_t stride = static_cast<int64_t>(last_block - first_block) * kBlockSize;
  float* scores = reinterpret_cast<float*>(scratch.data);
  float* sums = scores + kBlock * stride;
  uint16_t* weights = reinterpret_cast<uint16_t*>(sums + kBlock * dim);
  uint16_t* q = weights + kBlock * stride;
  for (int begin = 0; begin < rows; begin += kBlock) {
    const int count = rows - begin < kBlock ? rows - begin : kBlock;
    const bool two = count > kTileRows;
    for (int r = 0; r < count; ++r) {
      const int token = args.first_row + (begin + r) / group, head = args.kv_head * group + (begin + r) % group;
      const float* from = args.q + token * args.q_stride + static_cast<int64_t>(head) * dim;
      for (int e = 0; e < dim; e += kLanes) store_bf16(q + r * dim + e, load(from + e));
    }
    tile_scores(args, q, two, first_block, last_block, scores, stride);
    float inverse[kBlock];
    for (int r = 0; r < count; ++r) {
      const int position = args.positions[args.first_row + (begin + r) / group];
      int seen = args.window > 0 ? position - args.window + 1 - origin : 0;
      seen = seen < 0 ? 0 : seen;
      float* row = scores + r * stride;
      bias_row(args, row, origin, seen, position + 1 - origin, position, args.kv_head * group + (begin + r) % group);
      inverse[r] = 1.0f / tile_softmax(row, weights + r * stride, seen, position + 1 - origin, stride);
    }
    configure(value_config());
    tile_values(args, weights, stride, two, first_block, last_block, sums);
    configure(tile_config());
    for (int r = 0; r < count; ++r) {
      const int token = args.first_row + (begin + r) / group, head = args.kv_head * group + (begin + r) % group;
      float* to = args.out + token * args.out_stride + static_cast<int64_t>(head) * dim;
      for (int e = 0; e < dim; e += kLanes) store(to + e, load(sums + r * dim + e) * inverse[r]);
    }
  }
}

static void attend_with_tiles(int kv_format, const AttentionArgs& args, Scratch scratch) {
  if (kv_format != kBf16 || args.head_dim % 32 != 0) return attend(kv_format, args, scratch);
  const Tiles tiles;
  attend_bf16(args, scratch);
}

static bool allowed() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace amx

const Kernels* amx_kernels() {
  static const Kernels kernels = {
      "amx",          amx::pack_rows,   amx::linear_with_tiles, amx::norm_row, amx::rotate,
      amx::store_key, amx::store_value, amx::attend_with_tiles,            amx::scale_row, amx::add,      amx::adapt, amx::activate_rows,
  };
  // Once: under a hypervisor the question takes ten microseconds, and every call of a kernel by name comes here.
  static const bool here = [] {
    unsigned a = 7, b = 0, c = 0, d = 0;
    __asm__ volatile("cpuid" : "+a"(a), "=b"(b), "+c"(c), "=d"(d));
    const bool tiles = (d >> 22 & 1) && (d >> 24 & 1) && (d >> 25 & 1);
    return tiles && avx512_bf16_kernels() != nullptr && amx::allowed();
  }();
  return here ? &kernels : nullptr;
}

}  // namespace burnish
#else
namespace burnish {
const Kernels* amx_kernels() { return nullptr; }
}  // namespace burnish
#endif
