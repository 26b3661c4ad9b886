#pragma once

#include <cstdint>
#include <cstring>

#include "../common/types.h"

// Elementary functions without a branch or a call, so that a loop over them compiles to the registers of the function
// it is inlined into, and so that an element's bits depend neither on the instruction set nor on its place in a vector.
// Built with -ffp-contract=off.

namespace grok::cpu {

GROK_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

GROK_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Within 2 units in the last place. NaN gives NaN; below −87.33 the result, less than 2^-126, is 0.
GROK_INLINE float exp_f(float x) {
  constexpr float kLowest = -87.33654f, kHighest = 88.72283f;
  float y = x < kLowest ? kLowest : x;
  y = y > kHighest ? kHighest : y;
  constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: the addition rounds to an integer, in the low bits
  const float shifted = y * 1.44269504f + kShift;
  const float n = shifted - kShift;
  const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;  // y − n ln 2, whose first part has few bits
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = (p * r) * r + r + 1.0f;
  // 2^n in two factors: n reaches 128, which is one more than an exponent holds
  const int32_t whole = static_cast<int32_t>(float_to_bits(shifted) - float_to_bits(kShift));
  const int32_t half = whole >> 1;
  p *= bits_to_float(static_cast<uint32_t>(half + 127) << 23);
  p *= bits_to_float(static_cast<uint32_t>(whole - half + 127) << 23);
  p = x < kLowest ? 0.0f : p;
  return x > kHighest ? bits_to_float(0x7f800000u) : p;
}

// Within 3 units in the last place.
GROK_INLINE float tanh_f(float x) {
  const float a = x < 0.0f ? -x : x;
  // near 0, where 1 − 2 / (e^2a + 1) would cancel: a + a³ · q(a²), the Taylor series of tanh to a^13
  const float s = a * a;
  float q = 21844.0f / 6081075.0f;
  q = q * s - 1382.0f / 155925.0f;
  q = q * s + 62.0f / 2835.0f;
  q = q * s - 17.0f / 315.0f;
  q = q * s + 2.0f / 15.0f;
  q = q * s - 1.0f / 3.0f;
  const float small = a + a * s * q;
  const float large = 1.0f - 2.0f / (exp_f(2.0f * a) + 1.0f);
  const float y = a < 0.4f ? small : large;
  return x < 0.0f ? -y : (x == x ? y : x);
}

// Within 2e-7. Sources: the Taylor series up to 1; beyond, Abramowitz and Stegun, 7.1.26.
GROK_INLINE float erf_f(float x) {
  const float a = x < 0.0f ? -x : x;
  const float s = a * a;
  float q = -1.0f / 6894720.0f;
  q = q * s + 1.0f / 685440.0f;
  q = q * s - 1.0f / 75600.0f;
  q = q * s + 1.0f / 9360.0f;
  q = q * s - 1.0f / 1320.0f;
  q = q * s + 1.0f / 216.0f;
  q = q * s - 1.0f / 42.0f;
  q = q * s + 1.0f / 10.0f;
  q = q * s - 1.0f / 3.0f;
  const float small = 1.12837917f * (a + a * s * q);
  const float t = 1.0f / (1.0f + 0.3275911f * a);
  float p = 1.061405429f;
  p = p * t - 1.453152027f;
  p = p * t + 1.421413741f;
  p = p * t - 0.284496736f;
  p = p * t + 0.254829592f;
  const float large = 1.0f - p * t * exp_f(-s);
  const float y = a < 1.0f ? small : large;
  return x < 0.0f ? -y : (x == x ? y : x);
}

}  // namespace grok::cpu
