#include "rope.h"

#include <vector>

#include "fp8.h"

namespace grok::cpu {
namespace {

template <class X>
X* scratch(int64_t size) {
  thread_local std::vector<X> held;
  if (static_cast<int64_t>(held.size()) < size) held.resize(size);
  return held.data();
}

DType type_of(const float*) { return DType::f32; }
DType type_of(const BF16*) { return DType::bf16; }
DType type_of(const E4M3*) { return DType::e4m3; }

template <class X>
GROK_INLINE const X* head(const Heads& x, int64_t token, int64_t index) {
  return static_cast<const X*>(x.data) + token * x.token_stride + index * x.head_stride;
}

// Built with -ffp-contract=off: both products round, as in the definition.
template <class X>
GROK_INLINE void turn(const X* __restrict x, const float* __restrict cos, int64_t half, X* __restrict y) {
  const float* __restrict sin = cos + half;
  for (int64_t i = 0; i < half; ++i) {
    const float x1 = to_float(x[i]), x2 = to_float(x[half + i]);
    y[i] = from_float<X>(x1 * cos[i] - x2 * sin[i]);
    y[half + i] = from_float<X>(x2 * cos[i] + x1 * sin[i]);
  }
}

template <class X, class Kv>
GROK_INLINE void store(const X* __restrict x, int64_t c, Kv* __restrict row, float*) {
  for (int64_t i = 0; i < c; ++i) row[i] = from_float<Kv>(to_float(x[i]));
}

template <class X>
GROK_INLINE void store(const X* __restrict x, int64_t c, E4M3* __restrict row, float* scale) {
  uint32_t largest = 0;  // compared as bits, of which a NaN has the most
  for (int64_t i = 0; i < c; ++i) {
    const uint32_t bits = float_to_bits(to_float(x[i])) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  constexpr float kTiny = 0x1p-100f;  // the least amax: keeps 1 / scale finite
  const float amax = bits_to_float(largest);
  const float unit = (amax < kTiny ? kTiny : amax) / 448.0f;
  for (int64_t i = 0; i < c; ++i) row[i].bits = to_e4m3(to_float(x[i]) / unit);
  *scale = unit;
}

template <class X, class Kv>
GROK_INLINE void tokens(const RopeStoreKv& p, int64_t begin, int64_t end) {
  const int64_t c = p.head_size;
  const DType kv = type_of(static_cast<const Kv*>(nullptr));
  X* turned = scratch<X>(c);
  for (int64_t t = begin; t < end; ++t) {
    const float* cos = p.cos_sin + p.positions[t] * p.cos_sin_stride;
    X* out = static_cast<X*>(p.out) + t * p.q.count * c;
    for (int64_t h = 0; h < p.q.count; ++h) turn(head<X>(p.q, t, h), cos, c / 2, out + h * c);
    if (p.slots[t] < 0) continue;
    const int64_t page = p.slots[t] / p.page_size, slot = p.slots[t] % p.page_size;
    for (int64_t g = 0; g < p.k.count; ++g) {
      turn(head<X>(p.k, t, g), cos, c / 2, turned);  // rounds to its own type before the cache's
      store(turned, c, reinterpret_cast<Kv*>(p.k_pages.row(kv, page, g, slot)), p.k_pages.row_scale(page, g, slot));
      store(head<X>(p.v, t, g), c, reinterpret_cast<Kv*>(p.v_pages.row(kv, page, g, slot)),
            p.v_pages.row_scale(page, g, slot));
    }
  }
}

template <class X, class Kv>
void rope_store_kv_portable(const RopeStoreKv& p, int64_t begin, int64_t end) {
  tokens<X, Kv>(p, begin, end);
}

#if GROK_X86
template <class X, class Kv>
GROK_AVX2 void rope_store_kv_avx2(const RopeStoreKv& p, int64_t begin, int64_t end) {
  tokens<X, Kv>(p, begin, end);
}

template <class X, class Kv>
GROK_AVX512 void rope_store_kv_avx512(const RopeStoreKv& p, int64_t begin, int64_t end) {
  tokens<X, Kv>(p, begin, end);
}
#endif

template <class X, class Kv>
RopeStoreKvTokens select(Isa isa) {
  switch (isa) {
#if GROK_X86
    case Isa::avx512_bf16:
    case Isa::avx512: return rope_store_kv_avx512<X, Kv>;
    case Isa::avx2: return rope_store_kv_avx2<X, Kv>;
#endif
    default: return rope_store_kv_portable<X, Kv>;
  }
}

template <class X>
RopeStoreKvTokens select(Isa isa, DType kv) {
  if (kv == DType::f32) return select<X, float>(isa);
  return kv == DType::bf16 ? select<X, BF16>(isa) : select<X, E4M3>(isa);
}

}  // namespace

RopeStoreKvTokens rope_store_kv_tokens(Isa isa, DType x, DType kv) {
  return x == DType::f32 ? select<float>(isa, kv) : select<BF16>(isa, kv);
}

}  // namespace grok::cpu
