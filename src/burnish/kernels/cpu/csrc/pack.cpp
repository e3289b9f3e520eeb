#include "pack.h"

#include <algorithm>
#include <cstring>

namespace burnish {

namespace {

// Calls place(panel, lane, row) for every feature there is, panels being `lanes` features wide.
template <typename T, typename Place>
void each_row(const T* w, int n, int64_t stride, Place place) {
  for (int feature = 0; feature < n; ++feature) place(feature / kLanes, feature % kLanes, w + feature * stride);
}

}  // namespace

void pack_f32(const float* w, int n, int k, int64_t stride, int k_padded, float* to) {
  each_row(w, n, stride, [&](int panel, int lane, const float* row) {
    float* at = to + static_cast<size_t>(panel) * k_padded * kLanes + lane;
    for (int j = 0; j < k; ++j) at[static_cast<size_t>(j) * kLanes] = row[j];
  });
}

void pack_bf16(const uint16_t* w, int n, int k, int64_t stride, int k_padded, uint16_t* to) {
  each_row(w, n, stride, [&](int panel, int lane, const uint16_t* row) {
    uint16_t* at = to + static_cast<size_t>(panel) * k_padded * kLanes + lane * 2;
    for (int j = 0; j < k; ++j) at[static_cast<size_t>(j / 2) * 2 * kLanes + j % 2] = row[j];
  });
}

void pack_bytes(const uint8_t* w, int n, int k, int64_t stride, int k_padded, int offset, uint8_t* to) {
  each_row(w, n, stride, [&](int panel, int lane, const uint8_t* row) {
    uint8_t* at = to + static_cast<size_t>(panel) * k_padded * kLanes + lane * 4;
    for (int j = 0; j < k; ++j) at[static_cast<size_t>(j / 4) * 4 * kLanes + j % 4] = static_cast<uint8_t>(row[j] + offset);
  });
}

void pack_nibbles(const uint8_t* w, int n, int k, int64_t stride, int k_padded, uint8_t* to) {
  each_row(w, n, stride, [&](int panel, int lane, const uint8_t* row) {
    uint8_t* at = to + static_cast<size_t>(panel) * k_padded * kLanes / 2 + lane * 4;
    for (int j = 0; j < k; ++j) {
      const int value = (row[j] & 15) << (j % 8 < 4 ? 0 : 4);
      at[static_cast<size_t>(j / 8) * 4 * kLanes + j % 4] |= static_cast<uint8_t>(value);
    }
  });
}

}  // namespace burnish
