// From rows of weights, one per output feature, to the panels that the kernels read. `to` is zero before.
#pragma once

#include "types.h"

namespace burnish {

// w: [n][k] with `stride` elements between rows.
void pack_f32(const float* w, int n, int k, int64_t stride, int k_padded, float* to);
void pack_bf16(const uint16_t* w, int n, int k, int64_t stride, int k_padded, uint16_t* to);
// Bytes plus `offset`: 128 makes signed ones unsigned.
void pack_bytes(const uint8_t* w, int n, int k, int64_t stride, int k_padded, int offset, uint8_t* to);
// Values 0..15, two a byte.
void pack_nibbles(const uint8_t* w, int n, int k, int64_t stride, int k_padded, uint8_t* to);

}  // namespace burnish
