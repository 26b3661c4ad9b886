#include "quantize.h"

#include <algorithm>

#include "fp8.h"
#include "math.h"

namespace grok::cpu {
namespace {

constexpr float kTiny = 7.8886090522101181e-31f;  // 2^-100: a smaller amax counts as this

// |x| as integers, which have the order of the numbers with NaN as the largest, so that a maximum keeps it.
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
  static GROK_INLINE uint8_t round(float ratio) { return to_e4m3(ratio); }  // it saturates
};

struct Int8 {
  static constexpr float kLargest = 127.0f;
  // The ratio is at most 127 and the error of two divisions. A NaN is 0.
  static GROK_INLINE uint8_t round(float ratio) {
    constexpr float kShift = 12582912.0f;  // 1.5 * 2^23: the addition rounds to an integer, in the low bits
    const uint32_t bits = float_to_bits(ratio + kShift);
    return static_cast<uint8_t>(ratio == ratio ? bits : 0u);
  }
};

template <class X, class Format>
GROK_INLINE void rows(const Quantize& p, int64_t begin, int64_t end) {
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

template <class X, class Format>
void quantize_portable(const Quantize& p, int64_t begin, int64_t end) {
  rows<X, Format>(p, begin, end);
}

#if GROK_X86
template <class X, class Format>
GROK_AVX2 void quantize_avx2(const Quantize& p, int64_t begin, int64_t end) {
  rows<X, Format>(p, begin, end);
}

template <class X, class Format>
GROK_AVX512 void quantize_avx512(const Quantize& p, int64_t begin, int64_t end) {
  rows<X, Format>(p, begin, end);
}
#endif

template <class X, class Format>
QuantizeRows select(Isa isa) {
  switch (isa) {
#if GROK_X86
    case Isa::avx512_bf16:
    case Isa::avx512: return quantize_avx512<X, Format>;
    case Isa::avx2: return quantize_avx2<X, Format>;
#endif
    default: return quantize_portable<X, Format>;
  }
}

}  // namespace

QuantizeRows quantize_rows(Isa isa, DType format, DType x) {
  if (format == DType::e4m3) return x == DType::f32 ? select<float, Fp8>(isa) : select<BF16, Fp8>(isa);
  return x == DType::f32 ? select<float, Int8>(isa) : select<BF16, Int8>(isa);
}

}  // namespace grok::cpu
