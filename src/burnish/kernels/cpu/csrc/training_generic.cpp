// Plain C++: the oracle of the others, and what runs on processors they do not know.
#include "training.h"

#include <cmath>
#include <cstring>

#include "lanes.h"

namespace burnish {
namespace generic {

#include "training_numbers.inl"
#include "training_rows.inl"
#include "training_weights.inl"
#include "training_attention.inl"
#include "gptq.inl"

}  // namespace generic

const TrainingKernels* generic_training() {
  static const TrainingKernels kernels = {
      "generic",       generic::norm_forward, generic::norm_backward, generic::gate_forward,  generic::gate_backward,
      generic::rotate, generic::loss,         generic::dequantize,    generic::lanes_scratch, generic::attention_forward,
      generic::attention_backward,
      generic::gptq_scratch, generic::gptq_rows, nullptr, nullptr,
  };
  return &kernels;
}

}  // namespace burnish
