#pragma once

#include <cstdint>
#include <cstring>

#include "common/types.h"

// Elementary functions without branches or calls, so that a loop over them vectorises for the target of the function
// that it is inlined into, and so that the bits of an element depend neither on the instruction set nor on its place in
// a vector. Compiled with -ffp-contract=off.

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
  constexpr float kShift = 12582912.0f;  // 1.5 · 2^23: the addition rounds to an integer, in the low bits
  const float shifted = y * 1.44269504f + kShift;
  const float n = shifted - kShift;
  const float r = (y - n * 0.693359375f) + n * 2.12194440e-4f;  // y − n ln 2; the first product is exact
  float p = 1.0f / 5040.0f;
  p = p * r + 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = (p * r) * r + r + 1.0f;
  // 2^n as two factors: n may be 128, one more than an exponent can hold
  const int32_t whole = static_cast<int32_t>(float_to_bits(shifted) - float_to_bits(kShift));
  const int32_t half = whole >> 1;
  p *= bits_to_float(static_cast<uint32_t>(half + 127) << 23);
  p *= bits_to_float(static_cast<uint32_t>(whole - half + 127) << 23);
  p = x < kLowest ? 0.0f : p;
  return x > kHighest ? bits_to_float(0x7f800000u) : p;
}

GROK_INLINE double bits_to_double(uint64_t bits) {
  double value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

GROK_INLINE uint64_t double_to_bits(double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// exp(x) for x ≤ 0, within 2 units in the last place. NaN gives NaN; below −708 the result, about 2^-1021, is 0.
GROK_INLINE double exp_d(double x) {
  constexpr double kLowest = -708.0;
  const double y = x < kLowest ? kLowest : x;
  constexpr double kShift = 6755399441055744.0;  // 1.5 * 2^52, as in exp_f
  const double shifted = y * 1.4426950408889634 + kShift;
  const double n = shifted - kShift;
  const double r = (y - n * 0.693147180369123816490) - n * 1.90821492927058770002e-10;
  // the Taylor series to r¹³ (the next term is below 2^-57), in pairs: a chain of 13 dependent steps would be slow
  const double s = r * r, t = s * s;
  const double p2 = (1.0 / 2.0 + 1.0 / 6.0 * r) + (1.0 / 24.0 + 1.0 / 120.0 * r) * s;
  const double p6 = (1.0 / 720.0 + 1.0 / 5040.0 * r) + (1.0 / 40320.0 + 1.0 / 362880.0 * r) * s;
  const double p10 = (1.0 / 3628800.0 + 1.0 / 39916800.0 * r) + (1.0 / 479001600.0 + 1.0 / 6227020800.0 * r) * s;
  double p = (p2 + (p6 + p10 * t) * t) * s + r + 1.0;
  p *= bits_to_double((double_to_bits(shifted) - double_to_bits(kShift) + 1023u) << 52);
  return x < kLowest ? 0.0 : p;
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
