#include "panel_ops.h"

#include "fused_math.h"

namespace grok::cpu {
namespace {

GROK_INLINE void scale_body(const float* c, const float* scale, int64_t rows, bool add, float* result) {
  for (int64_t r = 0; r < rows; ++r, c += kPanel, result += kPanel) {
    for (int64_t n = 0; n < kPanel; ++n) {
      const float value = c[n] * scale[n];
      result[n] = add ? result[n] + value : value;
    }
  }
}

template <class T>
GROK_INLINE void store_rows(const float* c, int64_t rows, int64_t outputs, T* y, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r, c += kPanel, y += stride) {
    for (int64_t n = 0; n < outputs; ++n) y[n] = from_float<T>(c[n]);
  }
}

GROK_INLINE void store_body(const float* c, int64_t rows, int64_t outputs, DType elem, void* y, int64_t stride) {
  if (elem == DType::f32) {
    store_rows(c, rows, outputs, static_cast<float*>(y), stride);
  } else {
    store_rows(c, rows, outputs, static_cast<BF16*>(y), stride);
  }
}

// 0.5 x (1 + tanh u) is x · sigmoid(2u), where nothing cancels.
template <bool fused>
GROK_INLINE float gelu_tanh(float x) {
  return x * sigmoid_fused<fused>(1.59576912f * (x + 0.044715f * (x * x * x)));
}
GROK_INLINE float gelu(float x) { return 0.5f * x * (1.0f + erf_f(x * 0.707106781f)); }
template <bool fused>
GROK_INLINE float silu(float x) {
  return x * sigmoid_fused<fused>(x);
}

template <bool fused>
GROK_INLINE void activate_body(const float* gate, const float* up, int64_t rows, int64_t outputs, Activation activation,
                               DType elem, void* y, int64_t stride) {
  float row[kPanel];
  for (int64_t r = 0; r < rows; ++r, gate += kPanel, up += kPanel) {
    if (activation == Activation::gelu_tanh) {
      for (int64_t n = 0; n < kPanel; ++n) row[n] = gelu_tanh<fused>(gate[n]) * up[n];
    } else if (activation == Activation::gelu) {
      for (int64_t n = 0; n < kPanel; ++n) row[n] = gelu(gate[n]) * up[n];
    } else {
      for (int64_t n = 0; n < kPanel; ++n) row[n] = silu<fused>(gate[n]) * up[n];
    }
    store_body(row, 1, outputs, elem, static_cast<char*>(y) + r * stride * size_of(elem), stride);
  }
}

GROK_INLINE void add_weighted_body(const float* c, int64_t rows, const int32_t* order, int64_t a, const float* weight,
                                   float* y) {
  for (int64_t r = 0; r < rows; ++r, c += kPanel) {
    const float w = weight[order[r]];
    float* __restrict to = y + order[r] / a * kPanel;
    for (int64_t n = 0; n < kPanel; ++n) to[n] += w * c[n];
  }
}

#define GROK_PANEL_OPS(NAME, TARGET, FUSED)                                                                           \
  TARGET void scale_##NAME(const float* c, const float* scale, int64_t rows, bool add, float* result) {               \
    scale_body(c, scale, rows, add, result);                                                                          \
  }                                                                                                                   \
  TARGET void store_##NAME(const float* c, int64_t rows, int64_t outputs, DType elem, void* y, int64_t stride) {       \
    store_body(c, rows, outputs, elem, y, stride);                                                                    \
  }                                                                                                                   \
  TARGET void activate_##NAME(const float* gate, const float* up, int64_t rows, int64_t outputs, Activation activation, \
                              DType elem, void* y, int64_t stride) {                                                   \
    activate_body<FUSED>(gate, up, rows, outputs, activation, elem, y, stride);                                       \
  }                                                                                                                   \
  TARGET void add_weighted_##NAME(const float* c, int64_t rows, const int32_t* order, int64_t a, const float* weight, \
                                  float* y) {                                                                         \
    add_weighted_body(c, rows, order, a, weight, y);                                                                  \
  }                                                                                                                   \
  constexpr PanelOps k_##NAME{scale_##NAME, store_##NAME, activate_##NAME, add_weighted_##NAME};

GROK_PANEL_OPS(portable, , false)
#if GROK_X86
GROK_PANEL_OPS(avx2, GROK_AVX2, true)
GROK_PANEL_OPS(avx512, GROK_AVX512, true)
#endif

}  // namespace

const PanelOps& panel_ops(Isa isa) {
  switch (isa) {
#if GROK_X86
    case Isa::avx512_bf16:
    case Isa::avx512: return k_avx512;
    case Isa::avx2: return k_avx2;
#endif
    default: return k_portable;
  }
}

}  // namespace grok::cpu
