// AVX-512 with VNNI. Compiled twice: once plain, once with the bfloat16 instructions (BURNISH_ISA says under which name).
#include "kernels.h"

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

#include "micro_avx512.h"
#include "portable.inl"

}  // namespace BURNISH_ISA

const Kernels* BURNISH_JOIN(BURNISH_ISA, _kernels)() {
  static const Kernels kernels = {
      BURNISH_TEXT(BURNISH_ISA),  BURNISH_ISA::pack_rows, BURNISH_ISA::linear_rows, BURNISH_ISA::norm_row,
      BURNISH_ISA::rotate,        BURNISH_ISA::store_key, BURNISH_ISA::store_value, BURNISH_ISA::attend,
      BURNISH_ISA::scale_row, BURNISH_ISA::add,           BURNISH_ISA::adapt, BURNISH_ISA::activate_rows,
  };
  __builtin_cpu_init();
  bool here = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vnni");
#if defined(__AVX512BF16__)
  here = here && __builtin_cpu_supports("avx512bf16");
#endif
  return here ? &kernels : nullptr;
}

}  // namespace burnish
#else
namespace burnish {
const Kernels* BURNISH_JOIN(BURNISH_ISA, _kernels)() { return nullptr; }
}  // namespace burnish
#endif
