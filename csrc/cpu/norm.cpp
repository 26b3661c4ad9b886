#include "norm.h"

#include <cmath>

namespace grok::cpu {
namespace {

// The squares go to this many running sums, whatever the width of the registers: two of AVX-512, four of AVX2, eight of
// SSE. That fixes the order of the additions, and so the bits, for every instruction set, and hides their latency.
// Built with -ffp-contract=off: a fused multiply-add would round differently where there is one.
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

// The norm rounds to X before it is added.
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

// A row stays in the nearest cache from its first step to its last.
template <class X>
GROK_INLINE void sandwich_rows(const SandwichNorm& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    const X* h = static_cast<const X*>(p.h) + row * p.h_stride;
    const X* delta = static_cast<const X*>(p.delta) + row * p.delta_stride;
    X* sum = static_cast<X*>(p.sum) + row * p.d;
    X* y = static_cast<X*>(p.y) + row * p.d;
    if (!p.post_weight) {
      add(h, delta, sum, p.d);
    } else if (p.post_dtype == DType::f32) {
      add_normalized(h, delta, static_cast<const float*>(p.post_weight), sum, p.d, p.eps);
    } else {
      add_normalized(h, delta, static_cast<const BF16*>(p.post_weight), sum, p.d, p.eps);
    }
    if (p.pre_dtype == DType::f32) {
      normalize(sum, static_cast<const float*>(p.pre_weight), y, p.d, p.eps);
    } else {
      normalize(sum, static_cast<const BF16*>(p.pre_weight), y, p.d, p.eps);
    }
  }
}

template <class X, class W>
void rms_norm_portable(const RmsNorm& p, int64_t begin, int64_t end) {
  rms_rows<X, W>(p, begin, end);
}

template <class X>
void sandwich_norm_portable(const SandwichNorm& p, int64_t begin, int64_t end) {
  sandwich_rows<X>(p, begin, end);
}

#if GROK_X86
template <class X, class W>
GROK_AVX2 void rms_norm_avx2(const RmsNorm& p, int64_t begin, int64_t end) {
  rms_rows<X, W>(p, begin, end);
}

template <class X, class W>
GROK_AVX512 void rms_norm_avx512(const RmsNorm& p, int64_t begin, int64_t end) {
  rms_rows<X, W>(p, begin, end);
}

template <class X>
GROK_AVX2 void sandwich_norm_avx2(const SandwichNorm& p, int64_t begin, int64_t end) {
  sandwich_rows<X>(p, begin, end);
}

template <class X>
GROK_AVX512 void sandwich_norm_avx512(const SandwichNorm& p, int64_t begin, int64_t end) {
  sandwich_rows<X>(p, begin, end);
}
#endif

template <class X, class W>
RmsNormRows select(Isa isa) {
  switch (isa) {
#if GROK_X86
    case Isa::avx512_bf16:
    case Isa::avx512: return rms_norm_avx512<X, W>;
    case Isa::avx2: return rms_norm_avx2<X, W>;
#endif
    default: return rms_norm_portable<X, W>;
  }
}

template <class X>
SandwichNormRows select_sandwich(Isa isa) {
  switch (isa) {
#if GROK_X86
    case Isa::avx512_bf16:
    case Isa::avx512: return sandwich_norm_avx512<X>;
    case Isa::avx2: return sandwich_norm_avx2<X>;
#endif
    default: return sandwich_norm_portable<X>;
  }
}

}  // namespace

SandwichNormRows sandwich_norm_rows(Isa isa, DType h) {
  return h == DType::f32 ? select_sandwich<float>(isa) : select_sandwich<BF16>(isa);
}

RmsNormRows rms_norm_rows(Isa isa, DType x, DType weight) {
  if (x == DType::f32) return weight == DType::f32 ? select<float, float>(isa) : select<float, BF16>(isa);
  return weight == DType::f32 ? select<BF16, float>(isa) : select<BF16, BF16>(isa);
}

}  // namespace grok::cpu
