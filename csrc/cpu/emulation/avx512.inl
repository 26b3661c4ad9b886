#include <cstdint>
#include <cstring>

// AVX-512 in vector extensions of the compiler, as Intel's intrinsics guide defines each instruction. Included by
// cpu/avx512.h, after the compiler's header, whose types it uses.

#pragma GCC diagnostic ignored "-Wpsabi"  // registers that are passed in memory: all of this is inlined

namespace grok::cpu::emulation {

#define GROK_EMULATED GROK_AVX512 __attribute__((always_inline)) inline

template <class T>
struct LanesOf {
  typedef T Type __attribute__((vector_size(64)));
};
template <class T>
using Lanes = typename LanesOf<T>::Type;

// lane(i) for each i.
template <class T, class Result = __m512i, class F>
GROK_EMULATED Result make(F lane) {
  T out[64 / sizeof(T)];
  for (int i = 0; i < static_cast<int>(64 / sizeof(T)); ++i) out[i] = lane(i);
  Result result;
  std::memcpy(&result, out, 64);
  return result;
}

// A register as an array in memory, for lanes picked by an index.
template <class T>
struct Array {
  T at[64 / sizeof(T)];
  template <class Register>
  GROK_EMULATED explicit Array(Register value) {
    std::memcpy(at, &value, 64);
  }
  GROK_EMULATED T operator[](int i) const { return at[i]; }
};

template <class Register>
GROK_EMULATED Register load(const void* from) {
  Register result;
  std::memcpy(&result, from, 64);
  return result;
}
template <class Register>
GROK_EMULATED void store(void* to, Register value) {
  std::memcpy(to, &value, 64);
}
template <class T, class Mask>
GROK_EMULATED __m512i load_masked(Mask mask, const void* from) {  // does not touch what the mask leaves out
  return make<T>([&](int i) GROK_AVX512 {
    T value = 0;
    if (mask >> i & 1) std::memcpy(&value, static_cast<const char*>(from) + i * sizeof value, sizeof value);
    return value;
  });
}

GROK_EMULATED __m512 fmadd(__m512 a, __m512 b, __m512 c) {
  const Array<float> x(a), y(b), z(c);
  return make<float, __m512>([&](int i) GROK_AVX512 { return __builtin_fmaf(x[i], y[i], z[i]); });
}

// The odd product of a pair is added first; each addition is fused, and subnormal numbers count as zero.
GROK_EMULATED float flush(float value) { return __builtin_fabsf(value) < 1.17549435e-38f ? 0.0f * value : value; }
GROK_EMULATED float from_bf16(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return flush(value);
}
GROK_EMULATED __m512 dpbf16(__m512 sum, __m512i a, __m512i b) {
  const Array<float> s(sum);
  const Array<uint32_t> x(a), y(b);
  return make<float, __m512>([&](int i) GROK_AVX512 {
    const float odd = flush(__builtin_fmaf(from_bf16(x[i] & 0xffff0000u), from_bf16(y[i] & 0xffff0000u), s[i]));
    return flush(__builtin_fmaf(from_bf16(x[i] << 16), from_bf16(y[i] << 16), odd));
  });
}

GROK_EMULATED __m512i madd(__m512i a, __m512i b) {
  const Array<int16_t> x(a), y(b);
  return make<int32_t>([&](int i) GROK_AVX512 { return x[2 * i] * y[2 * i] + x[2 * i + 1] * y[2 * i + 1]; });
}
template <class T>
GROK_EMULATED __m512i widen(__m128i a) {
  T values[16];
  std::memcpy(values, &a, 16);
  return make<int32_t>([&](int i) GROK_AVX512 { return values[i]; });
}
GROK_EMULATED __m512i dpbusd(__m512i sum, __m512i u, __m512i s) {
  const Array<uint8_t> x(u);
  const Array<int8_t> y(s);
  const Array<int32_t> z(sum);
  return make<int32_t>([&](int i) GROK_AVX512 {
    uint32_t total = static_cast<uint32_t>(z[i]);  // wraps around
    for (int j = 4 * i; j < 4 * i + 4; ++j) total += static_cast<uint32_t>(int32_t{x[j]} * y[j]);
    return static_cast<int32_t>(total);
  });
}

// Interleaves the low (first = 0) or high halves of each 128-bit lane of a and b, in units of T.
template <class T>
GROK_EMULATED __m512i unpack(__m512i a, __m512i b, bool high) {
  constexpr int kLane = 16 / sizeof(T);
  const Array<T> x(a), y(b);
  return make<T>([&](int i) GROK_AVX512 {
    const int from = i / kLane * kLane + (high ? kLane / 2 : 0) + i % kLane / 2;
    return i % 2 ? y[from] : x[from];
  });
}

GROK_EMULATED __m512i permute_two(__m512i a, __m512i index, __m512i b) {
  const Array<uint8_t> x(a), y(b), at(index);
  return make<uint8_t>([&](int i) GROK_AVX512 { return at[i] & 64 ? y[at[i] & 63] : x[at[i] & 63]; });
}

GROK_EMULATED __m512i shuffle_bytes(__m512i a, __m512i index) {
  const Array<uint8_t> x(a), at(index);
  return make<uint8_t>([&](int i) GROK_AVX512 {
    return static_cast<uint8_t>(at[i] & 128 ? 0 : x[i / 16 * 16 + (at[i] & 15)]);
  });
}

// Bit 4a + 2b + c of `table` is the result for these bits of the three.
template <int table>
GROK_EMULATED __m512i ternary(__m512i a, __m512i b, __m512i c) {
  __m512i result = a ^ a;
  for (int row = 0; row < 8; ++row) {
    if (table >> row & 1) result |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
  }
  return result;
}

template <int at>
GROK_EMULATED __m512i insert(__m512i to, __m128i value) {
  std::memcpy(reinterpret_cast<char*>(&to) + 16 * at, &value, 16);
  return to;
}

template <class T>
GROK_EMULATED __m512i splat(T value) {
  return make<T>([&](int) GROK_AVX512 { return value; });
}
template <class T>
GROK_EMULATED uint64_t equal(__m512i a, __m512i b) {
  const Array<T> x(a), y(b);
  uint64_t mask = 0;
  for (int i = 0; i < static_cast<int>(64 / sizeof(T)); ++i) mask |= uint64_t{x[i] == y[i]} << i;
  return mask;
}
template <class T, class F>
GROK_EMULATED __m512i each(__m512i a, F of) {
  const Array<T> x(a);
  return make<T>([&](int i) GROK_AVX512 { return static_cast<T>(of(x[i])); });
}
template <class T, class F>
GROK_EMULATED __m512i each(__m512i a, __m512i b, F of) {
  const Array<T> x(a), y(b);
  return make<T>([&](int i) GROK_AVX512 { return static_cast<T>(of(x[i], y[i])); });
}
template <class T, class Mask>
GROK_EMULATED __m512i blend(__m512i otherwise, Mask mask, __m512i a) {
  const Array<T> x(a), y(otherwise);
  return make<T>([&](int i) GROK_AVX512 { return mask >> i & 1 ? x[i] : y[i]; });
}
GROK_EMULATED __m512 to_floats(__m512i a) {
  const Array<int32_t> x(a);
  return make<float, __m512>([&](int i) GROK_AVX512 { return static_cast<float>(x[i]); });
}
GROK_EMULATED __m512 widen_halves(__m256i a) {
  const __m256 low = _mm256_cvtph_ps(_mm256_castsi256_si128(a)), high = _mm256_cvtph_ps(_mm256_extracti128_si256(a, 1));
  return make<float, __m512>([&](int i) GROK_AVX512 { return i < 8 ? low[i] : high[i - 8]; });
}
GROK_EMULATED __m512i widen_bytes(__m256i a) {
  uint8_t x[32];
  std::memcpy(x, &a, 32);
  return make<uint16_t>([&](int i) GROK_AVX512 { return x[i]; });
}
template <class T>
GROK_EMULATED __m512i permute(__m512i index, __m512i a) {
  const Array<T> at(index), x(a);
  return make<T>([&](int i) GROK_AVX512 { return x[static_cast<int>(at[i] & (64 / sizeof(T) - 1))]; });
}
GROK_EMULATED void store_masked(void* to, uint16_t mask, __m512i a) {
  const Array<uint32_t> x(a);
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) std::memcpy(static_cast<uint32_t*>(to) + i, &x.at[i], 4);
  }
}

}  // namespace grok::cpu::emulation

namespace grok::cpu {

// Not inlined: kernels repeat these so often that compiling the copies would take minutes.
namespace emulation {
GROK_AVX512 __attribute__((noinline)) inline void add_pairs_of(__m512& sum, const __m512i& v, const uint32_t* pair) {
  sum = dpbf16(sum, v, splat(*pair));
}
GROK_AVX512 __attribute__((noinline)) inline void add_quads_of(__m512i& sum, const __m512i& v, const __m512i& x) {
  sum = dpbusd(sum, v, x);
}
}  // namespace emulation

GROK_EMULATED void add_pairs(__m512& sum, __m512i v, const uint32_t* pair) { emulation::add_pairs_of(sum, v, pair); }
GROK_EMULATED void add_quads(__m512i& sum, __m512i v, __m512i x) { emulation::add_quads_of(sum, v, x); }
GROK_EMULATED void keep(__m512i&) {}

}  // namespace grok::cpu

#undef _mm512_inserti32x4  // macros of the compiler's header, at some levels of optimisation
#undef _mm512_setr_epi64
#undef _mm512_slli_epi16
#undef _mm512_slli_epi32
#undef _mm512_srai_epi16
#undef _mm512_srli_epi32
#undef _mm512_ternarylogic_epi32
#define GROK_E ::grok::cpu::emulation
#define _mm512_load_si512(p) GROK_E::load<__m512i>(p)
#define _mm512_loadu_si512(p) GROK_E::load<__m512i>(p)
#define _mm512_loadu_ps(p) GROK_E::load<__m512>(p)
#define _mm512_load_ps(p) GROK_E::load<__m512>(p)
#define _mm512_store_si512(p, a) GROK_E::store(p, __m512i(a))
#define _mm512_storeu_si512(p, a) GROK_E::store(p, __m512i(a))
#define _mm512_store_ps(p, a) GROK_E::store(p, __m512(a))
#define _mm512_storeu_ps(p, a) GROK_E::store(p, __m512(a))
#define _mm512_maskz_loadu_epi8(m, p) GROK_E::load_masked<uint8_t>(m, p)
#define _mm512_maskz_loadu_epi16(m, p) GROK_E::load_masked<uint16_t>(m, p)
#define _mm512_mask_storeu_epi32(p, m, a) GROK_E::store_masked(p, m, a)
#define _mm512_set1_epi8(x) GROK_E::splat<int8_t>(x)
#define _mm512_set1_epi16(x) GROK_E::splat<int16_t>(x)
#define _mm512_set1_epi32(x) GROK_E::splat<int32_t>(x)
#define _mm512_set1_ps(x) ((__m512)GROK_E::splat<float>(x))
#define _mm512_setzero_ps() ((__m512)GROK_E::splat<float>(0.0f))
#define _mm512_setzero_si512() GROK_E::splat<int32_t>(0)
#define _mm512_setr_epi64(...) GROK_E::load<__m512i>((const int64_t[]){__VA_ARGS__})
#define _mm512_castsi512_ps(a) ((__m512)(a))
#define _mm512_castsi128_si512(a) GROK_E::insert<0>(_mm512_setzero_si512(), a)
#define _mm512_inserti32x4(a, b, at) GROK_E::insert<at>(a, b)
#define _mm512_fmadd_ps(a, b, c) GROK_E::fmadd(a, b, c)
#define _mm512_fnmadd_ps(a, b, c) GROK_E::fmadd(-(a), b, c)
#define _mm512_fmsub_ps(a, b, c) GROK_E::fmadd(a, b, -(c))
#define _mm512_add_ps(a, b) ((__m512)((a) + (b)))
#define _mm512_sub_ps(a, b) ((__m512)((a) - (b)))
#define _mm512_mul_ps(a, b) ((__m512)((a) * (b)))
#define _mm512_add_epi64(a, b) ((__m512i)((a) + (b)))
#define _mm512_add_epi16(a, b) ((__m512i)((GROK_E::Lanes<uint16_t>)(a) + (GROK_E::Lanes<uint16_t>)(b)))
#define _mm512_add_epi32(a, b) ((__m512i)((GROK_E::Lanes<uint32_t>)(a) + (GROK_E::Lanes<uint32_t>)(b)))
#define _mm512_and_si512(a, b) ((__m512i)((a) & (b)))
#define _mm512_or_si512(a, b) ((__m512i)((a) | (b)))
#define _mm512_xor_si512(a, b) ((__m512i)((a) ^ (b)))
#define _mm512_ternarylogic_epi32(a, b, c, table) GROK_E::ternary<table>(a, b, c)
#define _mm512_slli_epi16(a, n) ((__m512i)((GROK_E::Lanes<uint16_t>)(a) << (n)))
#define _mm512_srai_epi16(a, n) ((__m512i)((GROK_E::Lanes<int16_t>)(a) >> (n)))
#define _mm512_slli_epi32(a, n) ((__m512i)((GROK_E::Lanes<uint32_t>)(a) << (n)))
#define _mm512_srli_epi32(a, n) ((__m512i)((GROK_E::Lanes<uint32_t>)(a) >> (n)))
#define _mm512_mullo_epi32(a, b) ((__m512i)((GROK_E::Lanes<uint32_t>)(a) * (GROK_E::Lanes<uint32_t>)(b)))
#define _mm512_madd_epi16(a, b) GROK_E::madd(a, b)
#define _mm512_cvtepi8_epi32(a) GROK_E::widen<int8_t>(a)
#define _mm512_cvtepu8_epi32(a) GROK_E::widen<uint8_t>(a)
#define _mm512_shuffle_epi8(a, index) GROK_E::shuffle_bytes(a, index)
#define _mm512_permutex2var_epi8(a, index, b) GROK_E::permute_two(a, index, b)
#define _mm512_permutexvar_epi64(index, a) GROK_E::permute<uint64_t>(index, a)
#define _mm512_mask_permutexvar_epi32(otherwise, m, index, a) \
  GROK_E::blend<uint32_t>(otherwise, m, GROK_E::permute<uint32_t>(index, a))
#define _mm512_mask_mov_epi8(otherwise, m, a) GROK_E::blend<uint8_t>(otherwise, m, a)
#define _mm512_unpacklo_epi8(a, b) GROK_E::unpack<uint8_t>(a, b, false)
#define _mm512_unpackhi_epi8(a, b) GROK_E::unpack<uint8_t>(a, b, true)
#define _mm512_unpacklo_epi16(a, b) GROK_E::unpack<uint16_t>(a, b, false)
#define _mm512_unpackhi_epi16(a, b) GROK_E::unpack<uint16_t>(a, b, true)
#define _mm512_unpacklo_epi32(a, b) GROK_E::unpack<uint32_t>(a, b, false)
#define _mm512_unpackhi_epi32(a, b) GROK_E::unpack<uint32_t>(a, b, true)
#define _mm512_unpacklo_epi64(a, b) GROK_E::unpack<uint64_t>(a, b, false)
#define _mm512_unpackhi_epi64(a, b) GROK_E::unpack<uint64_t>(a, b, true)
#define _mm512_cvtph_ps(a) GROK_E::widen_halves(a)
#define _mm512_cvtepu8_epi16(a) GROK_E::widen_bytes(a)
#define _mm512_cmpeq_epi8_mask(a, b) GROK_E::equal<uint8_t>(a, b)
#define _mm512_min_epi8(a, b) GROK_E::each<int8_t>(a, b, [](int x, int y) GROK_AVX512 { return x < y ? x : y; })
#define _mm512_abs_epi8(a) GROK_E::each<int8_t>(a, [](int x) GROK_AVX512 { return x < 0 ? -x : x; })
#define _mm512_maskz_cvtepi32_ps(m, a) GROK_E::to_floats(a)
#define _mm512_dpbf16_ps(sum, a, b) GROK_E::dpbf16(sum, (__m512i)(a), (__m512i)(b))
#define _mm512_dpbusd_epi32(sum, a, b) GROK_E::dpbusd(sum, a, b)
