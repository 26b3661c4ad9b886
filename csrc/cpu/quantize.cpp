#include "cpu/quantize.h"

#include "cpu/dispatch.h"
#include "cpu/fp8.h"

namespace grok::cpu {
namespace {

constexpr float kTiny = 0x1p-100f;  // the smallest amax

// max |x|, compared as integers: they are ordered as the magnitudes, and NaN is the largest, so that the maximum
// keeps it.
template <class X>
GROK_INLINE float largest(const X* x, int64_t n) {
  uint32_t amax = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = float_to_bits(to_float(x[i])) & 0x7fffffffu;
    amax = magnitude > amax ? magnitude : amax;
  }
  return bits_to_float(amax);
}

struct Fp8 {
  static constexpr float kLargest = 448.0f;
  static GROK_INLINE uint8_t round(float ratio) { return to_e4m3(ratio); }
};

struct Int8 {
  static constexpr float kLargest = 127.0f;
  // The ratio exceeds 127 by no more than the rounding of two divisions. NaN becomes 0.
  static GROK_INLINE uint8_t round(float ratio) {
    constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: the addition rounds to an integer, in the low bits
    const uint32_t bits = float_to_bits(ratio + kShift);
    return static_cast<uint8_t>(ratio == ratio ? bits : 0u);
  }
};

template <class X, class Format>
GROK_INLINE void rows(const QuantizeRows& p, int64_t begin, int64_t end) {
  for (int64_t row = begin; row < end; ++row) {
    for (int64_t g = 0; g < p.groups; ++g) {
      const int64_t start = g * p.group, n = std::min(p.group, p.d - start);
      const X* __restrict x = static_cast<const X*>(p.x) + row * p.x_stride + start;
      uint8_t* __restrict q = static_cast<uint8_t*>(p.q) + row * p.d + start;
      const float amax = largest(x, n);
      const float scale = (amax < kTiny ? kTiny : amax) / Format::kLargest;
      p.scale[row * p.groups + g] = scale;
      for (int64_t i = 0; i < n; ++i) q[i] = Format::round(to_float(x[i]) / scale);
    }
  }
}

GROK_ROWS_KERNEL(quantize, rows, QuantizeRows)

template <class X>
RowsKernel<QuantizeRows> kernel_for(Isa isa, DType q) {
  return q == DType::e4m3 ? quantize_kernel<X, Fp8>(isa) : quantize_kernel<X, Int8>(isa);
}

}  // namespace

void quantize_rows(const QuantizeRows& p, Executor& executor) {
  check_float("quantize_rows: x", p.x_type);
  check(p.q_type == DType::e4m3 || p.q_type == DType::int8, "quantize_rows: q is ", name(p.q_type),
        ", expected e4m3 or int8");
  const Isa isa = current_isa();
  const auto kernel = p.x_type == DType::f32 ? kernel_for<float>(isa, p.q_type) : kernel_for<BF16>(isa, p.q_type);
  executor.parallel_for(p.rows, rows_per_range(p.d), [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace grok::cpu
