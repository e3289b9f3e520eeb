// Plain C++: the oracle of the others, and what runs on processors they do not know.
#include <cmath>
#include <cstring>

#include "kernels.h"
#include "lanes.h"

namespace burnish {
namespace generic {

struct Micro {
  static constexpr int rows = 2, panels = 2, attention_rows = 2;

  template <int R, int P>
  static void dot_int8(const uint8_t* w, size_t panel_bytes, const int8_t* const* a, int k_begin, int k_end, I16* acc) {
    for (int k = k_begin; k < k_end; k += 4) {
      for (int p = 0; p < P; ++p) {
        const uint8_t* at = w + p * panel_bytes + static_cast<size_t>(k) * kLanes;
        for (int r = 0; r < R; ++r) {
          const int8_t* x = a[r] + k;
          for (int lane = 0; lane < kLanes; ++lane) {
            const uint8_t* quad = at + lane * 4;
            acc[r * P + p][lane] += quad[0] * x[0] + quad[1] * x[1] + quad[2] * x[2] + quad[3] * x[3];
          }
        }
      }
    }
  }

  template <int R, int P>
  static void dot_int4(const uint8_t* w, size_t panel_bytes, const int8_t* const* a, int k_begin, int k_end, I16* acc) {
    for (int k = k_begin; k < k_end; k += 8) {
      for (int p = 0; p < P; ++p) {
        const uint8_t* at = w + p * panel_bytes + static_cast<size_t>(k) * kLanes / 2;
        for (int r = 0; r < R; ++r) {
          const int8_t* x = a[r] + k;
          for (int lane = 0; lane < kLanes; ++lane) {
            int32_t sum = 0;
            for (int i = 0; i < 4; ++i) sum += (at[lane * 4 + i] & 15) * x[i] + (at[lane * 4 + i] >> 4) * x[i + 4];
            acc[r * P + p][lane] += sum;
          }
        }
      }
    }
  }
};

#include "portable.inl"

}  // namespace generic

const Kernels* generic_kernels() {
  static const Kernels kernels = {
      "generic",        generic::pack_rows,   generic::linear_rows, generic::norm_row, generic::rotate,
      generic::store_key, generic::store_value, generic::attend,      generic::scale_row, generic::add,      generic::adapt, generic::activate_rows,
  };
  return &kernels;
}

}  // namespace burnish
