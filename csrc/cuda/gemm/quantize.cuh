#pragma once

#include <cstdint>

#include "../sm90.cuh"

namespace grok::cuda::gemm {

constexpr int kGroup = 128;  // columns that share a scale

// |x| as bits, which compare like the numbers, with NaN above all of them; fmaxf would drop a NaN.
__device__ __forceinline__ uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// Divides many numbers by one, in three instructions each: a quotient by the reciprocal, corrected by its remainder.
// The result is rounded as by a division, except for quotients within about 2⁻²³ ulp of a rounding boundary. Divided by
// infinity, a number gives 0 or NaN, as by a plain division. Other divisors, and the quotients, must lie in
// 2⁻¹²⁶..2¹²⁶.
struct Divisor {
  float value;

  __device__ __forceinline__ explicit Divisor(float divisor) : value(divisor), inverse_(sm90::reciprocal(divisor)) {
    negative_ = inverse_ == 0.0f ? 0.0f : -divisor;  // with -infinity the correction would turn every number into NaN
    inverse_ = fmaf(fmaf(inverse_, negative_, 1.0f), inverse_, inverse_);
  }

  __device__ __forceinline__ float divide(float x) const {
    const float quotient = __fmul_rn(x, inverse_);
    return fmaf(fmaf(quotient, negative_, x), inverse_, quotient);
  }

 private:
  float inverse_, negative_;
};

// max(amax, 2⁻¹⁰⁰) / 448, so that 1 / scale is finite. Infinity and NaN stay as they are.
__device__ __forceinline__ Divisor scale_of(uint32_t amax) {
  constexpr uint32_t kTiny = 27u << 23;  // 2⁻¹⁰⁰
  const float largest = __uint_as_float(max(amax, kTiny)), scale = Divisor(448.0f).divide(largest);
  return Divisor(scale == scale ? scale : largest);
}

// Two numbers to e4m3, saturating.
__device__ __forceinline__ uint16_t quantize(float low, float high, const Divisor& scale) {
  return sm90::pack_e4m3(scale.divide(low), scale.divide(high));
}

}  // namespace grok::cuda::gemm
