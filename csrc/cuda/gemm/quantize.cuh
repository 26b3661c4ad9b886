#pragma once

#include <cstdint>

#include "../sm90.cuh"

namespace grok::cuda::gemm {

constexpr int kGroup = 128;  // columns that share a scale

// |x| as bits: their order is that of the numbers, and a NaN is above all, where fmaxf would drop it.
__device__ __forceinline__ uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// Divides by one number many times, in three instructions: the quotient by the reciprocal, and what it leaves. That
// rounds as a division does, but for quotients within some 2⁻²³ of a unit of where that goes one way or the other. By
// infinity the quotient is 0, or NaN; a plain division is 0 or NaN there too. Others and the quotients lie in
// 2⁻¹²⁶..2¹²⁶.
struct Divisor {
  float value;

  __device__ __forceinline__ explicit Divisor(float divisor) : value(divisor), inverse_(sm90::reciprocal(divisor)) {
    negative_ = inverse_ == 0.0f ? 0.0f : -divisor;  // infinity would leave NaN of every number
    inverse_ = fmaf(fmaf(inverse_, negative_, 1.0f), inverse_, inverse_);
  }

  __device__ __forceinline__ float divide(float x) const {
    const float quotient = __fmul_rn(x, inverse_);
    return fmaf(fmaf(quotient, negative_, x), inverse_, quotient);
  }

 private:
  float inverse_, negative_;
};

// amax / 448; an amax below 2⁻¹⁰⁰ counts as that, so that 1 / scale is finite. Infinity and NaN stay.
__device__ __forceinline__ Divisor scale_of(uint32_t amax) {
  constexpr uint32_t kTiny = 27u << 23;  // 2⁻¹⁰⁰
  const float largest = __uint_as_float(max(amax, kTiny)), scale = Divisor(448.0f).divide(largest);
  return Divisor(scale == scale ? scale : largest);
}

// In e4m3, saturating.
__device__ __forceinline__ uint16_t quantize(float low, float high, const Divisor& scale) {
  return sm90::pack_e4m3(scale.divide(low), scale.divide(high));
}

}  // namespace grok::cuda::gemm
