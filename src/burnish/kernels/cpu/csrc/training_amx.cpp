// AVX-512 with bfloat16, and Intel's matrix tiles (AMX) for attention in bfloat16.
#include "training.h"

#if defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__AVX512BF16__) && defined(__linux__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "lanes.h"
#include "tiles.h"

namespace burnish {
namespace amx {

#include "training_numbers.inl"
#include "training_rows.inl"
#include "training_weights.inl"
#include "training_attention.inl"
#include "gptq.inl"
#include "training_tile_layout.inl"
#include "training_tiles.inl"
#include "gram_tiles.inl"

}  // namespace amx

const TrainingKernels* amx_training() {
  static const TrainingKernels kernels = {
      "amx",       amx::norm_forward, amx::norm_backward, amx::gate_forward,  amx::gate_backward,
      amx::rotate, amx::loss,         amx::dequantize,    amx::tiles_scratch, amx::attention_forward_tiles,
      amx::attention_backward_tiles,
      amx::gptq_scratch, amx::gptq_rows, amx::gram_lay_out, amx::gram_multiply,
  };
  return &kernels;
}

}  // namespace burnish
#else
namespace burnish {
const TrainingKernels* amx_training() { return nullptr; }
}  // namespace burnish
#endif
