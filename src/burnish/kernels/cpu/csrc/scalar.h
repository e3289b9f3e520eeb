// Conversions of one number. Everything here is static: each instruction set's file has its own copy, so that the
// linker cannot hand code for a newer processor to an older one.
#pragma once

#include <cstdint>
#include <cstring>

namespace burnish {

static inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

static inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

static inline float bf16_to_float(uint16_t value) { return bits_to_float(static_cast<uint32_t>(value) << 16); }

// Rounds half to even; NaN stays NaN.
static inline uint16_t float_to_bf16(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>(value != value ? 0x7fc0u : rounded);
}

static inline float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t rest = half & 0x7fffu;
  // A product moves the exponent's origin, and handles subnormals as well.
  const float scaled = bits_to_float(rest << 13) * bits_to_float(0x77800000u);
  const uint32_t magnitude = rest >= 0x7c00u ? 0x7f800000u | ((rest & 0x3ffu) << 13) : float_to_bits(scaled);
  return bits_to_float(sign | magnitude);
}

// Adding it to |x| < 2^22 leaves x rounded half to even in the low bits of the sum.
constexpr float kRoundMagic = 12582912.0f;
constexpr int32_t kRoundBits = 0x4b400000;

static inline int32_t round_to_int(float x) {
  return static_cast<int32_t>(float_to_bits(x + kRoundMagic)) - kRoundBits;
}

}  // namespace burnish
