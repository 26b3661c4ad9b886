#include "cpu/gemm/group_scales.h"

#include <algorithm>
#include <cstring>

#if GROK_X86
#include <immintrin.h>
#endif

namespace grok::cpu {
namespace {

GROK_INLINE float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16, rest = half & 0x7fffu;
  uint32_t bits = sign | ((rest << 13) + ((127 - 15) << 23));  // a normal number
  if (rest >= 0x7c00u) bits += (255 - 31 - 127 + 15) << 23;    // infinite or NaN
  float value;
  std::memcpy(&value, &bits, 4);
  if (rest >= 0x0400u) return value;
  value = static_cast<float>(rest) * 0x1p-24f;
  return sign ? -value : value;
}

template <class T>
GROK_INLINE void convert(const void* data, int64_t at, int64_t count, float* values) {
  const T* from = static_cast<const T*>(data) + at;
  if (count == kPanel) {  // of known length, for vectors
    for (int64_t n = 0; n < kPanel; ++n) values[n] = static_cast<float>(from[n]);
    return;
  }
  for (int64_t n = 0; n < kPanel; ++n) values[n] = n < count ? static_cast<float>(from[n]) : 0.0f;
}

// halves(from, values): converts 64 numbers of 16 bits.
template <class Halves>
GROK_INLINE void values_of(const Weights& w, const Plane& plane, int64_t expert, int64_t output, int64_t group,
                           float* values, Halves halves) {
  const int64_t at = plane.at(expert, output, group);
  const int64_t count = std::min(kPanel, w.n - output);
  switch (plane.type) {
    case ScaleType::f32: return convert<float>(plane.data, at, count, values);
    case ScaleType::u8: return convert<uint8_t>(plane.data, at, count, values);
    case ScaleType::i8: return convert<int8_t>(plane.data, at, count, values);
    case ScaleType::f16: break;
  }
  const uint16_t* from = static_cast<const uint16_t*>(plane.data) + at;
  if (count == kPanel) return halves(from, values);
  for (int64_t n = 0; n < kPanel; ++n) values[n] = n < count ? half_to_float(from[n]) : 0.0f;
}

template <class Halves>
GROK_INLINE void scales_of(const Weights& w, int64_t expert, int64_t output, int64_t group, float* s, float* m,
                           Halves halves) {
  // the group of the first level; a division is slow beside the rest
  const int64_t super = w.subscales.data ? group * w.scales.groups / w.groups : group;
  float sub[kPanel];
  values_of(w, w.scales, expert, output, super, s, halves);
  if (w.zeros.data) {
    values_of(w, w.zeros, expert, output, super, sub, halves);
    for (int64_t n = 0; n < kPanel; ++n) m[n] = s[n] * sub[n];
    return;
  }
  if (w.subscales.data) {
    values_of(w, w.subscales, expert, output, group, sub, halves);
    for (int64_t n = 0; n < kPanel; ++n) s[n] *= sub[n];
  }
  if (!w.minima.data) {
    const float zero_point = static_cast<float>(w.zero_point);
    for (int64_t n = 0; n < kPanel; ++n) m[n] = zero_point * s[n];
    return;
  }
  values_of(w, w.minima, expert, output, super, m, halves);
  if (w.subminima.data) {
    values_of(w, w.subminima, expert, output, group, sub, halves);
    for (int64_t n = 0; n < kPanel; ++n) m[n] *= sub[n];
  } else {
    for (int64_t n = 0; n < kPanel; ++n) m[n] = -m[n];
  }
}

void halves_portable(const uint16_t* halves, float* values) {
  for (int64_t n = 0; n < kPanel; ++n) values[n] = half_to_float(halves[n]);
}

#if GROK_X86
GROK_AVX2 inline void halves_avx2(const uint16_t* halves, float* values) {
  for (int64_t n = 0; n < kPanel; n += 8) {
    _mm256_storeu_ps(values + n, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(halves + n))));
  }
}

GROK_AVX2 void values_avx2(const Weights& w, const Plane& plane, int64_t expert, int64_t output, int64_t group,
                           float* values) {
  values_of(w, plane, expert, output, group, values, halves_avx2);
}

GROK_AVX2 void scales_avx2(const Weights& w, int64_t expert, int64_t output, int64_t group, float* s, float* m) {
  scales_of(w, expert, output, group, s, m, halves_avx2);
}
#endif

}  // namespace

void plane_values(const Weights& w, const Plane& plane, int64_t expert, int64_t output, int64_t group,
                  [[maybe_unused]] Isa isa, float* values) {
#if GROK_X86
  if (isa >= Isa::avx2) return values_avx2(w, plane, expert, output, group, values);
#endif
  values_of(w, plane, expert, output, group, values, halves_portable);
}

void group_scales(const Weights& w, int64_t expert, int64_t output, int64_t group, [[maybe_unused]] Isa isa, float* s,
                  float* m) {
#if GROK_X86
  if (isa >= Isa::avx2) return scales_avx2(w, expert, output, group, s, m);
#endif
  scales_of(w, expert, output, group, s, m, halves_portable);
}

const uint8_t* group_bytes(const Weights& w, const Plane& plane, int64_t expert, int64_t output, int64_t group,
                           uint8_t* room) {
  const uint8_t* from = static_cast<const uint8_t*>(plane.data) + plane.at(expert, output, group);
  const int64_t outputs = std::min(kPanel, w.n - output);
  if (outputs == kPanel) return from;
  std::memset(room, 0, kPanel);
  std::memcpy(room, from, outputs);
  return room;
}

void prefetch_scales(const Weights& w, int64_t expert, int64_t output, int64_t column, int64_t columns) {
  for (const Plane* plane : {&w.scales, &w.subscales, &w.minima, &w.subminima, &w.zeros}) {
    if (!plane->data) continue;
    const int64_t size = plane->type == ScaleType::f32 ? 4 : plane->type == ScaleType::f16 ? 2 : 1;
    const int64_t each = w.k / plane->groups;  // columns that share a number
    for (int64_t g = (column + each - 1) / each; g * each < column + columns; ++g) {
      const char* from = static_cast<const char*>(plane->data) + plane->at(expert, output, g) * size;
      for (int64_t byte = 0; byte < kPanel * size; byte += 64) __builtin_prefetch(from + byte);
    }
  }
}

}  // namespace grok::cpu
