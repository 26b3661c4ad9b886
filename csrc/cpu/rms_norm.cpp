#include "rms_norm.h"

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

template <class X, class W>
GROK_INLINE void rows(const RmsNorm& p, int64_t begin, int64_t end) {
  const W* __restrict weight = static_cast<const W*>(p.weight);
  const int64_t d = p.d;
  for (int64_t row = begin; row < end; ++row) {
    const X* __restrict x = static_cast<const X*>(p.x) + row * p.x_stride;
    X* __restrict y = static_cast<X*>(p.y) + row * d;
    const float inverse = 1.0f / std::sqrt(sum_of_squares(x, d) / static_cast<float>(d) + p.eps);
    for (int64_t i = 0; i < d; ++i) y[i] = from_float<X>(to_float(weight[i]) * to_float(x[i]) * inverse);
  }
}

template <class X, class W>
void rms_norm_portable(const RmsNorm& p, int64_t begin, int64_t end) {
  rows<X, W>(p, begin, end);
}

#if GROK_X86
template <class X, class W>
GROK_AVX2 void rms_norm_avx2(const RmsNorm& p, int64_t begin, int64_t end) {
  rows<X, W>(p, begin, end);
}

template <class X, class W>
GROK_AVX512 void rms_norm_avx512(const RmsNorm& p, int64_t begin, int64_t end) {
  rows<X, W>(p, begin, end);
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

}  // namespace

RmsNormRows rms_norm_rows(Isa isa, DType x, DType weight) {
  if (x == DType::f32) return weight == DType::f32 ? select<float, float>(isa) : select<float, BF16>(isa);
  return weight == DType::f32 ? select<BF16, float>(isa) : select<BF16, BF16>(isa);
}

}  // namespace grok::cpu
