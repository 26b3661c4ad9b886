#include "cpu/gemm/epilogue.h"

#include "cpu/dispatch.h"
#include "cpu/fused_math.h"

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

GROK_INLINE void store_body(const float* c, int64_t rows, int64_t outputs, DType type, void* y, int64_t stride) {
  if (type == DType::f32) {
    store_rows(c, rows, outputs, static_cast<float*>(y), stride);
  } else {
    store_rows(c, rows, outputs, static_cast<BF16*>(y), stride);
  }
}

// 0.5 x (1 + tanh u), computed as x · sigmoid(2u): without cancellation.
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
                               DType type, void* y, int64_t stride) {
  float row[kPanel];
  for (int64_t r = 0; r < rows; ++r, gate += kPanel, up += kPanel) {
    if (activation == Activation::gelu_tanh) {
      for (int64_t n = 0; n < kPanel; ++n) row[n] = gelu_tanh<fused>(gate[n]) * up[n];
    } else if (activation == Activation::gelu) {
      for (int64_t n = 0; n < kPanel; ++n) row[n] = gelu(gate[n]) * up[n];
    } else {
      for (int64_t n = 0; n < kPanel; ++n) row[n] = silu<fused>(gate[n]) * up[n];
    }
    store_body(row, 1, outputs, type, static_cast<char*>(y) + r * stride * size_of(type), stride);
  }
}

GROK_INLINE void add_weighted_body(const float* c, int64_t rows, const int32_t* order, int64_t active,
                                   const float* weight, float* y) {
  for (int64_t r = 0; r < rows; ++r, c += kPanel) {
    const float w = weight[order[r]];
    float* __restrict to = y + order[r] / active * kPanel;
    for (int64_t n = 0; n < kPanel; ++n) to[n] += w * c[n];
  }
}

#define GROK_EPILOGUE(NAME, TARGET, FUSED)                                                                            \
  TARGET void scale_##NAME(const float* c, const float* scale, int64_t rows, bool add, float* result) {               \
    scale_body(c, scale, rows, add, result);                                                                          \
  }                                                                                                                   \
  TARGET void store_##NAME(const float* c, int64_t rows, int64_t outputs, DType type, void* y, int64_t stride) {      \
    store_body(c, rows, outputs, type, y, stride);                                                                    \
  }                                                                                                                   \
  TARGET void activate_##NAME(const float* gate, const float* up, int64_t rows, int64_t outputs,                      \
                              Activation activation, DType type, void* y, int64_t stride) {                           \
    activate_body<FUSED>(gate, up, rows, outputs, activation, type, y, stride);                                       \
  }                                                                                                                   \
  TARGET void add_weighted_##NAME(const float* c, int64_t rows, const int32_t* order, int64_t active,                 \
                                  const float* weight, float* y) {                                                    \
    add_weighted_body(c, rows, order, active, weight, y);                                                             \
  }                                                                                                                   \
  constexpr Epilogue epilogue_##NAME{scale_##NAME, store_##NAME, activate_##NAME, add_weighted_##NAME};

GROK_EPILOGUE(portable, , false)
#if GROK_X86
GROK_EPILOGUE(avx2, GROK_AVX2, true)
GROK_EPILOGUE(avx512, GROK_AVX512, true)
#elif GROK_ARM
GROK_EPILOGUE(neon, , true)
#endif

}  // namespace

const Epilogue& epilogue_for(Isa isa) { return GROK_PICK(isa, epilogue); }

}  // namespace grok::cpu
