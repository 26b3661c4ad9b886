#pragma once

#include <cstdint>

#include "../sm90.cuh"

namespace grok::cuda::gemm {

constexpr int kGroup = 128;  // columns that share a scale

// |x| as bits: their order is that of the numbers, and a NaN is above all, where fmaxf would drop it.
__device__ __forceinline__ uint32_t magnitude(float x) { return __float_as_uint(x) & 0x7fffffffu; }

// amax / 448; an amax below 2⁻¹⁰⁰ counts as that, so that 1 / scale is finite.
__device__ __forceinline__ float scale_of(uint32_t amax) {
  constexpr uint32_t kTiny = 27u << 23;  // 2⁻¹⁰⁰
  return __fdiv_rn(__uint_as_float(max(amax, kTiny)), 448.0f);
}

// Saturating; the larger of a group divides to a little above 448 at most. A quotient by infinity or NaN is one of the
// two.
__device__ __forceinline__ uint16_t quantize_pair(float low, float high, float scale) {
  return sm90::pack_e4m3(__fdiv_rn(low, scale), __fdiv_rn(high, scale));
}

}  // namespace grok::cuda::gemm
