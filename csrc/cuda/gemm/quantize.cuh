#pragma once

#include <cstdint>

#include "../sm90.cuh"

namespace grok::cuda::gemm {

constexpr int kGroup = 128;  // columns that share a scale

// |x| as bits: their order is that of the numbers, and a NaN is above all, where fmaxf would drop it.
__device__ __forceinline__ uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// Divides by one number many times, and without the call that a division compiles to: the quotient is corrected twice
// by what it leaves, which gives the bits of the division. Of an infinite divisor nothing is left that is a number;
// then the first quotient, 0 or NaN, is right. Divisors lie in 2⁻¹²⁶..2¹²⁶ or are infinite or NaN, and so does the
// quotient.
struct Divisor {
  float value, inverse;

  __device__ __forceinline__ explicit Divisor(float divisor) : value(divisor) {
    const float first = __fdividef(1.0f, divisor);
    inverse = kept(fmaf(fmaf(-first, divisor, 1.0f), first, first), first);
  }

  __device__ __forceinline__ float divide(float x) const {
    const float first = __fmul_rn(x, inverse);
    const float second = fmaf(fmaf(-first, value, x), inverse, first);
    return kept(fmaf(fmaf(-second, value, x), inverse, second), first);
  }

  static __device__ __forceinline__ float kept(float x, float otherwise) { return x == x ? x : otherwise; }
};

// amax / 448; an amax below 2⁻¹⁰⁰ counts as that, so that 1 / scale is finite.
__device__ __forceinline__ Divisor scale_of(uint32_t amax) {
  constexpr uint32_t kTiny = 27u << 23;  // 2⁻¹⁰⁰
  return Divisor(Divisor(448.0f).divide(__uint_as_float(max(amax, kTiny))));
}

// In e4m3, saturating.
__device__ __forceinline__ uint16_t quantize(float low, float high, const Divisor& scale) {
  return sm90::pack_e4m3(scale.divide(low), scale.divide(high));
}

}  // namespace grok::cuda::gemm
