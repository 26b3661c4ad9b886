#pragma once

#include <cmath>

#include "../include/grok/gemm.h"
#include "../sm90.cuh"

namespace grok::cuda::gemm {

// x / (1 + 2⁻ᶻ). If the power overflows, the quotient is 0 for a finite x and NaN for an infinite one, as required.
__device__ __forceinline__ float logistic(float x, float z) {
  return x * sm90::reciprocal(1.0f + sm90::power_of_two(-z));
}

// silu is x · sigmoid(x). gelu_tanh, ½x(1 + tanh u), equals x · sigmoid(2u), which takes seven instructions.
template <Activation kActivation>
__device__ __forceinline__ float activate(float x) {
  constexpr float kLog2e = 1.4426950408889634f, kRoot = 1.5957691216057308f * kLog2e;  // 2 √(2 / π) and log₂ e
  if constexpr (kActivation == Activation::silu) return logistic(x, kLog2e * x);
  if constexpr (kActivation == Activation::gelu_tanh) return logistic(x, x * fmaf(0.044715f * kRoot, x * x, kRoot));
  return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
}

template <Activation kActivation, int kCount>
__device__ __forceinline__ void gate(float* gate, const float* up) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) gate[i] = activate<kActivation>(gate[i]) * up[i];
}

// values[i] = act(values[i]) · up[i]. The branch is repeated for every 8 values: 8 hide the latency of each
// instruction, and for more the compiler keeps so many intermediate values in flight that registers spill.
template <int kCount>
__device__ __forceinline__ void apply_gate(Activation activation, float* values, const float* up) {
#pragma unroll
  for (int i = 0; i < kCount; i += 8) {
    if (activation == Activation::gelu_tanh) {
      gate<Activation::gelu_tanh, 8>(values + i, up + i);
    } else if (activation == Activation::silu) {
      gate<Activation::silu, 8>(values + i, up + i);
    } else {
      gate<Activation::gelu, 8>(values + i, up + i);
    }
  }
}

}  // namespace grok::cuda::gemm
