#pragma once

#include <cstdint>

#include "cpu/math.h"

// The 8-bit float e4m3fn: 1 sign, 4 exponent and 3 mantissa bits, no infinity, NaN 0x7f and 0xff, largest number 448.
// Without branches or tables, so that a loop over the conversions vectorises. Subnormals are right also where the CPU
// flushes those of fp32: none occurs as an intermediate.

namespace grok::cpu {

struct E4M3 {
  uint8_t bits;
};

// Rounds to nearest, ties to even, and saturates: numbers beyond ±448, infinities too, become ±448. NaN keeps its sign.
GROK_INLINE uint8_t to_e4m3(float value) {
  constexpr uint32_t kLargest = 0x43e00000u, kSmallest = 0x3c800000u;  // 448; 2^-6, the smallest normal number
  constexpr uint32_t kUnit = 0x46800000u;  // 2^14, whose unit in the last place is 2^-9, that of the subnormals
  constexpr uint32_t kRebias = (127u - 7u) << 23;
  const uint32_t sign = float_to_bits(value) & 0x80000000u;
  const uint32_t magnitude = float_to_bits(value) ^ sign;
  const uint32_t bits = magnitude > kLargest ? kLargest : magnitude;
  const uint32_t small = float_to_bits(bits_to_float(bits) + bits_to_float(kUnit)) - kUnit;
  const uint32_t normal = (bits - kRebias + 0x7ffffu + ((bits >> 20) & 1u)) >> 20;
  uint32_t result = bits < kSmallest ? small : normal;
  result = magnitude > 0x7f800000u ? 0x7fu : result;
  return static_cast<uint8_t>(result | (sign >> 24));
}

// Exact.
GROK_INLINE float from_e4m3(uint8_t code) {
  constexpr uint32_t kRebias = (127u - 7u) << 23;
  const uint32_t magnitude = code & 0x7fu;
  const float subnormal = static_cast<float>(static_cast<int32_t>(magnitude)) * 0.001953125f;  // · 2^-9
  uint32_t bits = magnitude < 8u ? float_to_bits(subnormal) : (magnitude << 20) + kRebias;
  bits = magnitude == 0x7fu ? 0x7ff00000u : bits;
  return bits_to_float(bits | (static_cast<uint32_t>(code & 0x80u) << 24));
}

using grok::to_float;
GROK_INLINE float to_float(E4M3 value) { return from_e4m3(value.bits); }

}  // namespace grok::cpu
