// Kernels of quantizing: second moments of calibration inputs, and GPTQ's columns. Part of the tables of training.h.
//
// Letters: N rows (tokens), I in features, O out features, G groups of in features.
#pragma once

#include <cstdint>

namespace burnish {

// total += x' x, where the row's number is not below the column's in steps of kGramStrip; the rest is not touched.
struct GramPass {
  int32_t rows, width;
  const uint16_t* x;      // bfloat16 [N][I]
  int64_t x_stride;
  float* total;           // [I][I]
};

struct GptqPass {
  int32_t rows, width;    // O and I
  int32_t group;          // in features of a full group
  int32_t max_int;
  int32_t symmetric;
  int32_t num_shrinks;    // 0: no search
  const float* weight;    // [O][I], in features in the order of quantizing
  int64_t weight_stride;
  const float* factor;    // [I][I], upper triangular
  const float* shrinks;   // shares of the whole range to try
  const float* importance;  // [I], weights of the squared errors in the search
  uint8_t* ints;          // [O][I]
  float* scales;          // [O][G], numbers that float16 holds
  uint8_t* zeros;         // [O][G]
};

constexpr int kGramStrip = 32;   // in features of one strip
constexpr int kGramRows = 512;   // rows that are multiplied at once, a multiple of 32

// Panels of sixteen rows that share what they read of a wide factor while it is near.
inline int gptq_panels(const GptqPass& pass) { return pass.width > 2048 ? 4 : 1; }

}  // namespace burnish
