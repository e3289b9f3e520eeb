// AVX-512. Compiled twice: once plain, once with the bfloat16 instructions (BURNISH_ISA says under which name).
#include "training.h"

#ifndef BURNISH_ISA
#define BURNISH_ISA avx512
#endif
#define BURNISH_JOIN_(a, b) a##b
#define BURNISH_JOIN(a, b) BURNISH_JOIN_(a, b)
#define BURNISH_TEXT_(a) #a
#define BURNISH_TEXT(a) BURNISH_TEXT_(a)

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512VNNI__)
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "lanes.h"

namespace burnish {
namespace BURNISH_ISA {

#include "training_numbers.inl"
#include "training_rows.inl"
#include "training_weights.inl"
#include "training_attention.inl"
#include "gptq.inl"

}  // namespace BURNISH_ISA

const TrainingKernels* BURNISH_JOIN(BURNISH_ISA, _training)() {
  static const TrainingKernels kernels = {
      BURNISH_TEXT(BURNISH_ISA),      BURNISH_ISA::norm_forward,       BURNISH_ISA::norm_backward,
      BURNISH_ISA::gate_forward,      BURNISH_ISA::gate_backward,      BURNISH_ISA::rotate,
      BURNISH_ISA::loss,              BURNISH_ISA::dequantize,         BURNISH_ISA::lanes_scratch,
      BURNISH_ISA::attention_forward, BURNISH_ISA::attention_backward,
      BURNISH_ISA::gptq_scratch, BURNISH_ISA::gptq_rows, nullptr, nullptr,
  };
  return &kernels;
}

}  // namespace burnish
#else
namespace burnish {
const TrainingKernels* BURNISH_JOIN(BURNISH_ISA, _training)() { return nullptr; }
}  // namespace burnish
#endif
