// The values that cross from Python to C++ and between the files here. Plain structs: Python mirrors them with ctypes.
//
// Letters: M rows of activations, N output features, K input features, T tokens of a step, S sequences, L rows whose
// logits are wanted, D hidden size, H query heads, G kv heads, E head dim.
#pragma once

#include <cstddef>
#include <cstdint>

namespace burnish {

// Bumped whenever a struct or a packed layout changes; Python refuses another number.
constexpr int32_t kAbiVersion = 9;

constexpr int kLanes = 16;      // output features of one weight panel
constexpr int kKAlign = 64;     // input features are padded to this in rows of activations and in packed weights
constexpr int kRowAlign = 32;   // buffers of activations hold this many rows more than asked, so that tiles may overrun
constexpr int kBlockSize = 16;  // tokens of one KV block
constexpr int kMaxThreads = 64;

enum Format : int32_t {
  kNone = 0,
  kF32 = 1,     // [panel][K][16] float
  kBf16 = 2,    // [panel][K / 2][16][2] bfloat16
  kInt8 = 3,    // [panel][K / 4][16][4] weight + 128; scale per output feature
  kInt4 = 4,    // [panel][K / 8][16][4] two of a feature's weights a byte: k in the low, k + 4 in the high nibble
  kInt8G = 5,   // as kInt8, but with a scale (and a zero point) per group of input features
};

// y = x W' + bias. K is padded with zeros to kKAlign, N to a whole number of pairs of panels.
struct Linear {
  int32_t format;
  int32_t n;            // output features
  int32_t k;            // input features
  int32_t num_panels;   // even
  int32_t k_padded;
  int32_t group;        // input features per scale; k_padded where there is one scale
  int32_t num_groups;
  int32_t reserved;
  const void* weight;
  const float* scale;         // kInt8: [num_panels * 16]
  const uint16_t* group_scale;  // kInt4, kInt8G: float16 [panel][group][16]
  const uint8_t* group_zero;    // kInt4, kInt8G: [panel][group][16]
  const float* requant_scale;   // kInt4, kInt8G: [num_panels * 16], scale of the feature's weights as one int8 column
  const float* bias;            // [n] or null
  const int32_t* order;         // [k]: input feature j of W is order[j] of x; null where they agree
};

// Rows of activations in the form a Linear reads.
struct Rows {
  void* data;       // kF32: float, kBf16: bfloat16, integers: int8; [rows][k_padded]
  float* scale;     // integers: [rows]
  int32_t* sums;    // integers: [rows][num_groups] sums of the row's integers
};

enum Activation : int32_t { kIdentity = 0, kSilu = 1, kGelu = 2, kGeluTanh = 3, kRelu = 4, kQuickGelu = 5 };

// What happens to a product's rows.
enum Finish : int32_t {
  kStore = 0,   // out[m][n] = y
  kAdd = 1,     // out[m][n] += y
  kActivate = 2,  // out[m][n] = act(y)
  kGate = 3,    // panels come in pairs, gate and up: out[m][n] = act(gate) * up
  kArgMax = 4,  // nothing is stored but the largest value of each row and where it stands
};

struct Best {
  float value;
  int32_t index;  // -1: none yet, -2: a NaN was seen
};

struct Output {
  int32_t finish;
  int32_t activation;
  float* data;     // [rows][stride]
  int64_t stride;
  float softcap;   // 0: none; c * tanh(y / c), for logits
  Best* best;      // kArgMax: [rows] of this thread
};

struct Norm {
  int32_t kind;  // 0: none, 1: RMS, 2: layer
  int32_t width;
  float eps;
  int32_t reserved;
  const float* weight;
  const float* bias;  // layer norm only
};

// A low-rank adapter of one linear: y += (x A') B'. Out of order where the base is.
struct Adapter {
  int32_t rank;      // 0: this linear has none
  int32_t in;
  int32_t out;
  int32_t reserved;
  const float* a;    // [rank][in]
  const float* b;    // [out][rank], the scaling multiplied in
};

// The places of one layer that an adapter may change.
enum AdapterPlace : int32_t { kAtQ, kAtK, kAtV, kAtO, kAtGate, kAtUp, kAtDown, kNumAdapterPlaces };

struct Layer {
  Norm input_norm, post_attention_norm, attention_output_norm, mlp_output_norm, q_norm, k_norm;
  Linear qkv, o, up, down;  // up: gate and up panels in turn where the MLP is gated
  float scale;              // of the scores
  int32_t window;           // 0: none
  int32_t local_rope;       // 1: takes the second rope table
  int32_t reserved;
  // A block's keys of one head stand feature by feature: [E][16], bfloat16 in pairs of features [E / 2][16][2]. Its values
  // stand token by token: [16][E to whole 16s], bfloat16 in pairs of tokens [E / 16][8][16][2]. E is even.
  void* keys;    // [block][G]
  void* values;  // [block][G]
  float* key_scale;         // int8 cache: [block][G][16]
  float* value_scale;
};

struct Decoder {
  int32_t hidden, inner, num_heads, num_kv_heads, head_dim, vocab, num_layers;
  int32_t gated, activation;
  int32_t parallel_residual, shared_norm, residual_from_norm;
  int32_t rotary_dim, rotary_interleaved;
  int32_t kv_format;           // kF32, kBf16 or kInt8
  int32_t embedding_format;    // kF32, kBf16 or kInt8 (with a scale per row)
  int32_t max_positions;       // rows of the rope or position tables
  int32_t num_adapters;
  float embedding_scale, attention_softcap, logit_softcap, alibi_scale;
  const void* embedding;          // [vocab][hidden]
  const float* embedding_row_scale;
  const float* position_embedding;  // [max_positions][hidden] or null
  const float* rope_cos;          // [max_positions][rotary_dim / 2] or null
  const float* rope_sin;
  const float* local_rope_cos;
  const float* local_rope_sin;
  const float* alibi_slopes;      // [H] or null
  int64_t alibi_bfloat16;
  Norm embedding_norm, final_norm;
  Linear head;
  const Layer* layers;
  const Adapter* adapters;        // [num_adapters][num_layers][kNumAdapterPlaces]
};

struct Step {
  int32_t num_tokens, num_sequences, num_logits, table_width;
  int32_t greedy;
  int32_t reserved;
  const int32_t* tokens;        // [T]
  const int32_t* positions;     // [T]
  const int32_t* row_starts;    // [S + 1]
  const int32_t* context_lens;  // [S]
  const int32_t* block_tables;  // [S][table_width]
  const int32_t* logit_rows;    // [L]
  const int32_t* adapters;      // [S], -1: none
  const float* rope_cos;        // [T][rotary_dim / 2] in place of the decoder's tables, or null
  const float* rope_sin;
  const float* local_rope_cos;
  const float* local_rope_sin;
  int64_t* ids;                 // greedy: [L], -1 where the logits are NaN
  float* logits;                // otherwise: [L][vocab]
};

}  // namespace burnish
