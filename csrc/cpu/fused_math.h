#pragma once

#include "cpu/math.h"

// The functions of math.h that the inner loops of attention and of the expert layer need, at half the operations: with
// fused multiply-adds where the instruction set has them, and only for arguments that occur there. The bits of an
// element differ between instruction sets.

namespace grok::cpu {

template <bool fused>
GROK_INLINE float multiply_add(float a, float b, float c) {
  return fused ? __builtin_fmaf(a, b, c) : a * b + c;
}

// exp(x) for x of at most 0. Within 3 units in the last place; below −87, 0. NaN gives NaN.
template <bool fused>
GROK_INLINE float exp_below(float x) {
  constexpr float kLowest = -87.0f, kShift = 12582912.0f;  // 1.5 * 2^23: the addition rounds to an integer
  const float y = x < kLowest ? kLowest : x;
  const float shifted = multiply_add<fused>(y, 1.44269504f, kShift);
  const float n = shifted - kShift;
  const float r = multiply_add<fused>(n, 2.12194440e-4f, multiply_add<fused>(n, -0.693359375f, y));  // y − n ln 2
  float p = 1.0f / 720.0f;
  p = multiply_add<fused>(p, r, 1.0f / 120.0f);
  p = multiply_add<fused>(p, r, 1.0f / 24.0f);
  p = multiply_add<fused>(p, r, 1.0f / 6.0f);
  p = multiply_add<fused>(p, r, 0.5f);
  p = multiply_add<fused>(p, r, 1.0f);
  p = multiply_add<fused>(p, r, 1.0f);
  p *= bits_to_float((float_to_bits(shifted) - float_to_bits(kShift) + 127u) << 23);
  return x < kLowest ? 0.0f : p;
}

// Within 5 units in the last place.
template <bool fused>
GROK_INLINE float tanh_fused(float x) {
  const uint32_t sign = float_to_bits(x) & 0x80000000u;
  const float a = bits_to_float(float_to_bits(x) ^ sign);
  // near 0, where 1 − e^-2a would cancel: the Taylor series to a^13
  const float s = a * a;
  float q = 21844.0f / 6081075.0f;
  q = multiply_add<fused>(q, s, -1382.0f / 155925.0f);
  q = multiply_add<fused>(q, s, 62.0f / 2835.0f);
  q = multiply_add<fused>(q, s, -17.0f / 315.0f);
  q = multiply_add<fused>(q, s, 2.0f / 15.0f);
  q = multiply_add<fused>(q, s, -1.0f / 3.0f);
  const float small = multiply_add<fused>(a * s, q, a);
  const float e = exp_below<fused>(-2.0f * a);
  const float large = (1.0f - e) / (1.0f + e);
  return bits_to_float(float_to_bits(a < 0.4f ? small : large) | sign);
}

// 1 / (1 + e^-x), within 5 units in the last place; below −87, 0.
template <bool fused>
GROK_INLINE float sigmoid_fused(float x) {
  const float e = exp_below<fused>(x < 0.0f ? x : -x);
  return (x < 0.0f ? e : 1.0f) / (1.0f + e);
}

}  // namespace grok::cpu
