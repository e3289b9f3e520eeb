// AVX2 and FMA.
#include "training.h"

#if defined(__AVX2__) && defined(__FMA__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "lanes.h"

namespace burnish {
namespace avx2 {

#include "training_numbers.inl"
#include "training_rows.inl"
#include "training_weights.inl"
#include "training_attention.inl"
#include "gptq.inl"

}  // namespace avx2

const TrainingKernels* avx2_training() {
  static const TrainingKernels kernels = {
      "avx2",       avx2::norm_forward, avx2::norm_backward, avx2::gate_forward,      avx2::gate_backward,
      avx2::rotate, avx2::loss,         avx2::dequantize,    avx2::lanes_scratch,     avx2::attention_forward,
      avx2::attention_backward,
      avx2::gptq_scratch, avx2::gptq_rows, nullptr, nullptr,
  };
  return &kernels;
}

}  // namespace burnish
#else
namespace burnish {
const TrainingKernels* avx2_training() { return nullptr; }
}  // namespace burnish
#endif
