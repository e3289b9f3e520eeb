// Kernels of fine-tuning, and of quantizing: passes over rows of tensors that lie in Python's memory.
//
// One instance of the table per instruction set, all computing the same, in float32 between what is read and what is
// stored. Rows of a tensor may lie apart (a stride in elements), the values of a row not.
// Letters: N rows (tokens), D width, H query heads, G kv heads, E head dim, V vocabulary, R sequences.
#pragma once

#include "kernels.h"
#include "quantize.h"

namespace burnish {

struct NormPass {
  int32_t format;         // kF32 or kBf16: x, y and their gradients
  int32_t weight_format;  // the same, weight and bias
  int32_t kind;           // 1: RMS, 2: layer
  int32_t rows, width;
  int32_t again;          // forward: `stats` are given
  float eps, offset;      // offset: added to the weight, which is then applied before rounding
  const void* x;
  int64_t x_stride;
  const void* weight;
  const void* bias;       // or null
  void* y;                // forward: written; backward: its gradient, read
  int64_t y_stride;
  float* stats;           // [N][2] mean (0 for RMS) and 1 / deviation
  const void* residual;   // backward: added to the gradient of x, or null; may be `grad_x`
  int64_t residual_stride;
  void* grad_x;
  int64_t grad_x_stride;
  float* grad_weight;     // [D] or null
  float* grad_bias;
};

// Backward writes what is not null; outputs may be the inputs themselves.
struct GatePass {
  int32_t format, activation;
  int32_t rows, width;
  const void* gate;
  const void* up;         // null: no gate, the activation alone
  const void* grad;       // of the product; backward only
  void* product;
  void* grad_gate;
  void* grad_up;
  int64_t gate_stride, up_stride, grad_stride, product_stride, grad_gate_stride, grad_up_stride;
};

struct RotatePass {
  int32_t format, interleaved, inverse;
  int32_t rows, heads, head_dim, pairs;
  int32_t reserved;
  void* x;                // [N][heads][head_dim]
  int64_t stride;
  const float* cos;       // [N][pairs]
  const float* sin;
};

struct LossPass {
  int32_t format, with_grad;
  int32_t rows, width;
  float softcap;          // 0: none
  float grad_scale;
  void* logits;           // [N][V], made into gradients
  const int64_t* labels;  // [N], -100: none
  float* losses;          // [N]
};

struct AttentionPass {
  int32_t format;
  int32_t num_sequences, num_heads, num_kv_heads, head_dim;
  int32_t window;         // 0: none
  float scale;
  int32_t reserved;
  const int32_t* starts;  // [R + 1]
  const float* slopes;    // [H] or null
  const void* q;
  const void* k;
  const void* v;
  void* out;              // forward: written; backward: read
  float* lse;             // [N][H]
  const void* grad_out;   // backward, and so below
  void* grad_q;
  void* grad_k;
  void* grad_v;
  int64_t q_stride, k_stride, v_stride, out_stride, grad_out_stride, grad_q_stride, grad_k_stride, grad_v_stride;
};

// Blocks of four-bit weights go on from row to row; two share a byte, the first in the upper half. Eight bits: a scale a row.
struct DequantizePass {
  int32_t format;              // of `out`
  int32_t rows, width;
  int32_t block_size;          // weights per scale
  const void* codes;           // uint8 [ceil(N D / 2)], or int8 [N][D]
  const float* levels;         // [16], what four bits stand for; null: eight bits
  const void* absmax;          // scales: float [blocks], or uint8 where there are `absmax_levels`; eight bits: float [N]
  const float* absmax_levels;  // [256] or null
  const float* absmax_scale;   // [ceil(blocks / kScalesPerBlock)]
  const float* absmax_offset;  // [1]
  void* out;
  int64_t out_stride;
};

constexpr int kScalesPerBlock = 256;

// One kv head of one sequence; forward: only the queries first .. last - 1 of it.
struct AttentionItem {
  int32_t begin, length;  // the sequence's rows
  int32_t kv_head;
  int32_t first, last;
};

struct TrainingKernels {
  const char* name;

  void (*norm_forward)(const NormPass& pass, int first, int last);
  // grad_weight, grad_bias: [width to 16s], added to; or null.
  void (*norm_backward)(const NormPass& pass, int first, int last, float* grad_weight, float* grad_bias);
  void (*gate_forward)(const GatePass& pass, int first, int last);
  void (*gate_backward)(const GatePass& pass, int first, int last);
  void (*rotate)(const RotatePass& pass, int first, int last);
  void (*loss)(const LossPass& pass, int first, int last);
  void (*dequantize)(const DequantizePass& pass, int first, int last);

  // Bytes of scratch that an item of a sequence of `length` needs.
  size_t (*attention_scratch)(const AttentionPass& pass, int length, bool backward);
  void (*attention_forward)(const AttentionPass& pass, const AttentionItem& item, char* scratch);
  void (*attention_backward)(const AttentionPass& pass, const AttentionItem& item, char* scratch);

  // Bytes of scratch, and rows from `first` on, gptq_panels(pass) panels of sixteen; false: a scale is beyond float16.
  size_t (*gptq_scratch)(const GptqPass& pass);
  bool (*gptq_rows)(const GptqPass& pass, int first, char* scratch);
  // One strip's factors of rows first .. first + count - 1, and its products with the strips up to itself; null where
  // there are no matrix tiles.
  void (*gram_lay_out)(const GramPass& pass, int strip, int first, int count, uint16_t* left, uint16_t* right);
  void (*gram_multiply)(const GramPass& pass, int strip, int count, const uint16_t* left, const uint16_t* right);
};

// The table of an instruction set that runs here; null where there is none.
const TrainingKernels* training_named(const char* name);

const TrainingKernels* generic_training();
const TrainingKernels* avx2_training();  // null where the compiler lacks it; so below
const TrainingKernels* avx512_training();
const TrainingKernels* avx512_bf16_training();
const TrainingKernels* amx_training();

}  // namespace burnish
