#include "cpu/norm.h"

#include <cmath>

#include "cpu/dispatch.h"

namespace grok::cpu {
namespace {

// Squares are added into 32 running sums on every instruction set: two registers of AVX-512, four of AVX2, eight of
// SSE. That fixes the order of the additions, and so the bits, and hides the latency of an addition. Compiled with
// -ffp-contract=off: a fused multiply-add, which not every instruction set has, rounds differently.
constexpr int64_t kLanes = 32;

template <class X>
GROK_INLINE float sum_of_squares(const X* x, int64_t d) {
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= d; i += kLanes) {
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const float value = to_float(x[i + lane]);
      sums[lane] += value * value;
    }
  }
  for (int64_t lane = 0; i + lane < d; ++lane) {
    const float value = to_float(x[i + lane]);
    sums[lane] += value * value;
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return sums[0];
}

template <class X>
GROK_INLINE float inverse_rms(const X* x, int64_t d, float eps) {
  return 1.0f / std::sqrt(sum_of_squares(x, d) / static_cast<float>(d) + eps);
}

template <class X, class W>
GROK_INLINE void normalize(const X* __restrict x, const W* __restrict weight, X* __restrict y, int64_t d, float eps) {
  const float inverse = inverse_rms(x, d, eps);
  for (int64_t i = 0; i < d; ++i) y[i] = from_float<X>(to_float(weight[i]) * to_float(x[i]) * inverse);
}

template <class X>
GROK_INLINE void add(const X* __restrict h, const X* __restrict delta, X* __restrict sum, int64_t d) {
  for (int64_t i = 0; i < d; ++i) sum[i] = from_float<X>(to_float(h[i]) + to_float(delta[i]));
}

// The norm is rounded to X before it is added.
template <class X, class W>
GROK_INLINE void add_normalized(const X* __restrict h, const X* __restrict delta, const W* __restrict weight,
                                X* __restrict sum, int64_t d, float eps) {
  const float inverse = inverse_rms(delta, d, eps);
  for (int64_t i = 0; i < d; ++i) {
    const X norm = from_float<X>(to_float(weight[i]) * to_float(delta[i]) * inverse);
    sum[i] = from_float<X>(to_float(h[i]) + to_float(norm));
  }
}

template <class X, class W>
GROK_INLINE void rms_rows(const RmsNorm& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const X* x = static_cast<const X*>(p.x) + row * p.x_stride;
    normalize(x, static_cast<const W*>(p.weight), static_cast<X*>(p.y) + row * p.d, p.d, p.eps);
  }
}

// A row stays in L1 from its first step to its last.
template <class X>
GROK_INLINE void sandwich_rows(const SandwichNorm& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const X* h = static_cast<const X*>(p.h) + row * p.h_stride;
    const X* delta = static_cast<const X*>(p.delta) + row * p.delta_stride;
    X* sum = static_cast<X*>(p.sum) + row * p.d;
    X* y = static_cast<X*>(p.y) + row * p.d;
    if (!p.post_weight) {
      add(h, delta, sum, p.d);
    } else if (p.post_type == DType::f32) {
      add_normalized(h, delta, static_cast<const float*>(p.post_weight), sum, p.d, p.eps);
    } else {
      add_normalized(h, delta, static_cast<const BF16*>(p.post_weight), sum, p.d, p.eps);
    }
    if (p.pre_type == DType::f32) {
      normalize(sum, static_cast<const float*>(p.pre_weight), y, p.d, p.eps);
    } else {
      normalize(sum, static_cast<const BF16*>(p.pre_weight), y, p.d, p.eps);
    }
  }
}

template <class X>
GROK_INLINE void sum_rows(const ScaledSum& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const X* __restrict a = static_cast<const X*>(p.a) + row * p.a_stride;
    const X* __restrict b = static_cast<const X*>(p.b) + row * p.b_stride;
    X* __restrict y = static_cast<X*>(p.y) + row * p.d;
    for (int64_t i = 0; i < p.d; ++i) y[i] = from_float<X>((to_float(a[i]) + to_float(b[i])) / p.divisor);
  }
}

GROK_ROWS_KERNEL(rms_norm, rms_rows, RmsNorm)
GROK_ROWS_KERNEL(sandwich_norm, sandwich_rows, SandwichNorm)
GROK_ROWS_KERNEL(scaled_sum, sum_rows, ScaledSum)

template <class X>
RowsKernel<RmsNorm> rms_norm_kernel_for(Isa isa, DType weight) {
  return weight == DType::f32 ? rms_norm_kernel<X, float>(isa) : rms_norm_kernel<X, BF16>(isa);
}

}  // namespace

void rms_norm(const RmsNorm& p, Executor& executor) {
  check_float("rms_norm: x", p.x_type);
  check_float("rms_norm: weight", p.weight_type);
  const Isa isa = current_isa();
  const auto kernel = p.x_type == DType::f32 ? rms_norm_kernel_for<float>(isa, p.weight_type)
                                             : rms_norm_kernel_for<BF16>(isa, p.weight_type);
  executor.parallel_for(p.rows, rows_per_range(p.d), [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

void sandwich_norm(const SandwichNorm& p, Executor& executor) {
  check_float("sandwich_norm: h", p.type);
  check_float("sandwich_norm: pre_weight", p.pre_type);
  if (p.post_weight) check_float("sandwich_norm: post_weight", p.post_type);
  const Isa isa = current_isa();
  const auto kernel = p.type == DType::f32 ? sandwich_norm_kernel<float>(isa) : sandwich_norm_kernel<BF16>(isa);
  executor.parallel_for(p.rows, rows_per_range(p.d), [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

void scaled_sum(const ScaledSum& p, Executor& executor) {
  check_float("scaled_sum: a", p.type);
  const Isa isa = current_isa();
  const auto kernel = p.type == DType::f32 ? scaled_sum_kernel<float>(isa) : scaled_sum_kernel<BF16>(isa);
  executor.parallel_for(p.rows, rows_per_range(p.d), [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace grok::cpu
