#pragma once

#include <cmath>

#include "../include/grok/gemm.h"
#include "../sm90.cuh"

namespace grok::cuda::gemm {

// x / (1 + exp(-z)). Where the exponential overflows the quotient is 0, and NaN for an infinite x, as it should be.
__device__ __forceinline__ float logistic(float x, float z) { return __fdividef(x, 1.0f + __expf(-z)); }

// silu is x · sigmoid(x), and gelu by tanh, ½x(1 + tanh u), the same as x · sigmoid(2u).
__device__ __forceinline__ float activate(float x, Activation activation) {
  constexpr float kRoot = 1.5957691216057308f;  // 2 √(2 / π)
  if (activation == Activation::gelu) return 0.5f * x * (1.0f + erff(x * 0.70710678118654752f));
  return logistic(x, activation == Activation::silu ? x : kRoot * fmaf(0.044715f * x * x, x, x));
}

}  // namespace grok::cuda::gemm
