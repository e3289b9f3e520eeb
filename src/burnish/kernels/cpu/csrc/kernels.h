// The table of kernels: one instance per instruction set, all computing the same.
#pragma once

#include "types.h"

namespace burnish {

// A thread's own memory for one call: bytes from `data` on, as many as `scratch_bytes` said.
struct Scratch {
  char* data;
};

struct AttentionArgs {
  const float* q;           // row of T: [H][E], scaled and rotated; stride q_stride
  int64_t q_stride;
  float* out;               // [T][H * E]
  int64_t out_stride;
  const int32_t* positions;  // [T]
  const int32_t* table;      // block ids of the sequence
  const void* keys;
  const void* values;
  const float* key_scale;
  const float* value_scale;
  int32_t first_row, num_rows;  // of T, this item's tokens
  int32_t kv_head, num_heads, num_kv_heads, head_dim;
  int32_t window;
  float softcap;
  const float* alibi_slopes;  // [H] or null
  float alibi_scale;
  bool alibi_bfloat16;
};

struct Kernels {
  const char* name;

  // Turns `rows` rows of x (stride in floats) into the form that `linear` reads, from row `first` of `to` on.
  void (*pack_rows)(const Linear& linear, const float* x, int64_t stride, int first, int rows, Rows to, float* scratch);

  // y = x W' + b for panels first_panel .. last_panel - 1 (even numbers) and `rows` rows from row 0 of `x` on.
  void (*linear)(const Linear& linear, Rows x, int rows, int first_panel, int last_panel, const Output& output,
                 Scratch scratch);

  // out = norm(x) for one row of `width` values; in place is fine.
  void (*norm)(const Norm& norm, const float* x, float* out);

  // Rotates one head's leading rotary_dim values in place.
  void (*rotate)(float* head, const float* cos, const float* sin, int rotary_dim, bool interleaved);

  // Stores one token's keys or values of one kv head at place `place` of its block.
  void (*store_key)(int format, const float* key, int head_dim, void* block, float* scale, int place);
  void (*store_value)(int format, const float* value, int head_dim, void* block, float* scale, int place);

  // Attention of one kv head's queries for a run of tokens of one sequence.
  void (*attend)(int kv_format, const AttentionArgs& args, Scratch scratch);

  // x *= factor
  void (*scale)(float* x, float factor, int64_t count);

  // out = a + b
  void (*add)(const float* a, const float* b, float* out, int64_t count);

  // y += (x A') B' for one row; scratch holds `rank` floats.
  void (*adapt)(const Adapter& adapter, const float* x, float* y, float* scratch);

  // out = act(raw), or act(gate) * up where raw holds sixteen gates and sixteen ups in turn; width: multiple of 16.
  void (*activate)(bool gated, int activation, const float* raw, float* out, int width);
};

// Query rows (tokens times heads that share a kv head) that one attention item takes at most.
constexpr int kMaxAttentionRows = 512;

const Kernels* generic_kernels();
const Kernels* avx2_kernels();     // null where the processor or the compiler lacks it; so below
const Kernels* avx512_kernels();
const Kernels* avx512_bf16_kernels();
const Kernels* amx_kernels();
const Kernels* best_kernels();
const Kernels* kernels_named(const char* name);

}  // namespace burnish
