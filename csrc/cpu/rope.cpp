#include "cpu/rope.h"

#include <vector>

#include "cpu/dispatch.h"
#include "cpu/fp8.h"

namespace grok::cpu {
namespace {

template <class X>
X* scratch(int64_t size) {
  thread_local std::vector<X> memory;
  if (static_cast<int64_t>(memory.size()) < size) memory.resize(size);
  return memory.data();
}

DType type_of(const float*) { return DType::f32; }
DType type_of(const BF16*) { return DType::bf16; }
DType type_of(const E4M3*) { return DType::e4m3; }

template <class X>
GROK_INLINE const X* head(const Heads& x, int64_t token, int64_t index) {
  return static_cast<const X*>(x.data) + token * x.token_stride + index * x.head_stride;
}

// Compiled with -ffp-contract=off: both products are rounded, as in the definition.
template <class X>
GROK_INLINE void rotate(const X* __restrict x, const float* __restrict cos, int64_t half, X* __restrict y) {
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
  uint32_t largest = 0;  // of the magnitudes, compared as integers: NaN is the largest
  for (int64_t i = 0; i < c; ++i) {
    const uint32_t bits = float_to_bits(to_float(x[i])) & 0x7fffffffu;
    largest = bits > largest ? bits : largest;
  }
  constexpr float kTiny = 0x1p-100f;  // the smallest amax: keeps 1 / scale finite
  const float amax = bits_to_float(largest);
  const float unit = (amax < kTiny ? kTiny : amax) / 448.0f;
  for (int64_t i = 0; i < c; ++i) row[i].bits = to_e4m3(to_float(x[i]) / unit);
  *scale = unit;
}

template <class X, class Kv>
GROK_INLINE void tokens(const RopeStoreKv& p, int64_t begin, int64_t end) {
  const int64_t c = p.head_size;
  const DType kv = type_of(static_cast<const Kv*>(nullptr));
  X* rotated = scratch<X>(c);
  for (int64_t t = begin; t < end; ++t) {
    const float* cos = p.cos_sin + p.positions[t] * p.cos_sin_stride;
    X* out = static_cast<X*>(p.out) + t * p.q.count * c;
    for (int64_t h = 0; h < p.q.count; ++h) rotate(head<X>(p.q, t, h), cos, c / 2, out + h * c);
    if (p.slots[t] < 0) continue;
    const int64_t page = p.slots[t] / p.page_size, slot = p.slots[t] % p.page_size;
    for (int64_t g = 0; g < p.k.count; ++g) {
      rotate(head<X>(p.k, t, g), cos, c / 2, rotated);  // rounded to its own type before that of the pages
      store(rotated, c, reinterpret_cast<Kv*>(p.k_pages.row(kv, page, g, slot)), p.k_pages.row_scale(page, g, slot));
      store(head<X>(p.v, t, g), c, reinterpret_cast<Kv*>(p.v_pages.row(kv, page, g, slot)),
            p.v_pages.row_scale(page, g, slot));
    }
  }
}

GROK_ROWS_KERNEL(rope_store_kv, tokens, RopeStoreKv)

template <class X>
RowsKernel<RopeStoreKv> kernel_for(Isa isa, DType kv) {
  if (kv == DType::f32) return rope_store_kv_kernel<X, float>(isa);
  return kv == DType::bf16 ? rope_store_kv_kernel<X, BF16>(isa) : rope_store_kv_kernel<X, E4M3>(isa);
}

}  // namespace

void rope_store_kv(const RopeStoreKv& p, Executor& executor) {
  check_float("rope_store_kv: q", p.type);
  if (p.kv_type != DType::e4m3) check_float("rope_store_kv: the pages", p.kv_type);
  const Isa isa = current_isa();
  const auto kernel = p.type == DType::f32 ? kernel_for<float>(isa, p.kv_type) : kernel_for<BF16>(isa, p.kv_type);
  const int64_t per_token = (p.q.count + 2 * p.k.count) * p.head_size;
  executor.parallel_for(p.tokens, rows_per_range(per_token),
                        [&](int64_t begin, int64_t end) { kernel(p, begin, end); });
}

}  // namespace grok::cpu
