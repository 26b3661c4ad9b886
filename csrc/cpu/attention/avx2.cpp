// Attention over bf16 or e4m3 pages on AVX2, in fp32.

#include "cpu/attention/tile.h"
#include "cpu/fp8.h"

#if GROK_X86

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own header, PR 105593
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace grok::cpu::attention {
namespace {

#define GROK_FP32 GROK_AVX2
#define GROK_FP32_NAME(NAME) NAME##_avx2

using Vec = __m256;
constexpr int kWidth = 8;
constexpr int64_t kRowsAtOnce = 6;
constexpr int score_vectors(int rows) { return rows == 1 ? 8 : rows <= 3 ? 4 : 2; }
constexpr int value_pairs(int rows) { return rows == 1 ? 4 : rows <= 3 ? 2 : 1; }
constexpr int kScoresAhead = 64;  // rows of the next block that `scores` prefetches

GROK_AVX2 inline __m128i load_128(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
GROK_AVX2 inline __m256i load_256(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
GROK_AVX2 inline Vec load(const float* from) { return _mm256_loadu_ps(from); }
GROK_AVX2 inline void store(float* to, Vec v) { _mm256_storeu_ps(to, v); }
GROK_AVX2 inline Vec zero() { return _mm256_setzero_ps(); }
GROK_AVX2 inline Vec splat(const float* from) { return _mm256_broadcast_ss(from); }
GROK_AVX2 inline Vec multiply(Vec a, Vec b) { return _mm256_mul_ps(a, b); }
GROK_AVX2 inline Vec add_product(Vec sum, Vec a, Vec b) { return _mm256_fmadd_ps(a, b, sum); }
GROK_AVX2 inline Vec widen_half(const void* from) { return _mm256_cvtph_ps(load_128(from)); }

// The low and the high bf16 number of each 32-bit lane.
GROK_AVX2 inline Vec low_bf16(const void* pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(load_256(pairs), 16)); }
GROK_AVX2 inline Vec high_bf16(const void* pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(load_256(pairs), _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
}

// 16 e4m3 codes as fp16 numbers of 2⁻⁸ times their value. Without `nans` the code of NaN becomes 1.875.
template <bool nans>
GROK_AVX2 inline __m256i halves(__m128i codes) {
  const __m256i shifted = _mm256_slli_epi16(_mm256_cvtepi8_epi16(codes), 7);  // sign, sign, exponent, mantissa
  const __m256i half = _mm256_and_si256(shifted, _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
  if constexpr (!nans) return half;
  // only NaN carries into bit 14, the top of the exponent of fp16
  const __m256i next = _mm256_add_epi16(half, _mm256_set1_epi16(0x80));
  return _mm256_or_si256(half, _mm256_and_si256(next, _mm256_set1_epi16(0x4000)));
}

GROK_AVX2 bool has_nan(const void* const* rows, int64_t width) {
  __m256i largest = _mm256_setzero_si256();
  for (int64_t j = 0; j < kBlock; ++j) {
    for (int64_t c = 0; c < width; c += 32) {
      const __m256i codes = load_256(static_cast<const char*>(rows[j]) + c);
      largest = _mm256_max_epu8(largest, _mm256_or_si256(codes, _mm256_set1_epi8(static_cast<char>(0x80))));
    }
  }
  return _mm256_movemask_epi8(_mm256_cmpeq_epi8(largest, _mm256_set1_epi8(-1))) != 0;
}

template <bool nans>
GROK_AVX2 void convert_values(Workspace& w, int64_t width, uint16_t* y) {
  const void* const* rows = w.block->v;
  for (int64_t j = 0; j < kBlock; ++j, y += width) {
    for (int64_t c = 0; c < width; c += 16) {
      const __m256i half = halves<nans>(load_128(static_cast<const char*>(rows[j]) + c));
      _mm256_store_si256(reinterpret_cast<__m256i*>(y + c), half);
    }
  }
}

// Transposes 4 × 4 dwords in each half of x, and stores them `stride` bytes apart.
GROK_AVX2 inline void transpose_store(const __m256i* x, char* y, int64_t stride) {
  const __m256i a = _mm256_unpacklo_epi32(x[0], x[1]), b = _mm256_unpacklo_epi32(x[2], x[3]);
  const __m256i c = _mm256_unpackhi_epi32(x[0], x[1]), d = _mm256_unpackhi_epi32(x[2], x[3]);
  _mm256_store_si256(reinterpret_cast<__m256i*>(y + 0 * stride), _mm256_unpacklo_epi64(a, b));
  _mm256_store_si256(reinterpret_cast<__m256i*>(y + 1 * stride), _mm256_unpackhi_epi64(a, b));
  _mm256_store_si256(reinterpret_cast<__m256i*>(y + 2 * stride), _mm256_unpacklo_epi64(c, d));
  _mm256_store_si256(reinterpret_cast<__m256i*>(y + 3 * stride), _mm256_unpackhi_epi64(c, d));
}

// bf16 keys: pair i of columns of key j goes to dword i · kBlock + j.
GROK_AVX2 void transpose_bf16(Workspace& w, int64_t width, char* y) {
  const void* const* rows = w.block->k;
  for (int64_t j = 0; j < kBlock; j += 8) {
    for (int64_t i = 0; i < width / 2; i += 4) {
      __m256i x[4];  // half k of x[n] is of key j + 4k + n
      for (int n = 0; n < 4; ++n) {
        const auto part = [&](int64_t key) GROK_AVX2 { return load_128(static_cast<const char*>(rows[key]) + 4 * i); };
        x[n] = _mm256_inserti128_si256(_mm256_castsi128_si256(part(j + n)), part(j + n + 4), 1);
      }
      transpose_store(x, y + 4 * (i * kBlock + j), 4 * kBlock);
    }
  }
}

// e4m3 keys: column c of key j goes, as fp16, to word c · kBlock + j.
template <bool nans>
GROK_AVX2 void transpose_e4m3(Workspace& w, int64_t width, char* y) {
  const void* const* rows = w.block->k;
  for (int64_t j = 0; j < kBlock; j += 16) {
    for (int64_t c = 0; c < width; c += 16) {
      __m256i low[8], high[8];  // columns c + 0–3, 8–11 and c + 4–7, 12–15 of two keys, interleaved
      for (int n = 0; n < 8; ++n) {
        const __m256i a = halves<nans>(load_128(static_cast<const char*>(rows[j + 2 * n]) + c));
        const __m256i b = halves<nans>(load_128(static_cast<const char*>(rows[j + 2 * n + 1]) + c));
        low[n] = _mm256_unpacklo_epi16(a, b);
        high[n] = _mm256_unpackhi_epi16(a, b);
      }
      for (int part = 0; part < 2; ++part) {
        const __m256i* from = part ? high : low;
        __m256i x[4], z[4];
        for (int n = 0; n < 4; ++n) {
          x[n] = _mm256_permute2x128_si256(from[n], from[n + 4], 0x20);
          z[n] = _mm256_permute2x128_si256(from[n], from[n + 4], 0x31);
        }
        transpose_store(x, y + 2 * ((c + 4 * part) * kBlock + j), 2 * kBlock);
        transpose_store(z, y + 2 * ((c + 4 * part + 8) * kBlock + j), 2 * kBlock);
      }
    }
  }
}

GROK_AVX2 inline void load_e4m3(Workspace& w, int64_t width, char* keys, uint16_t* values) {
  const bool nans = has_nan(w.block->k, width) || has_nan(w.block->v, width);
  (nans ? transpose_e4m3<true> : transpose_e4m3<false>)(w, width, keys);
  (nans ? convert_values<true> : convert_values<false>)(w, width, values);
}

#include "cpu/attention/fp32.inl"

}  // namespace

Kernel avx2_kernel(DType kv) { return kernel_of(kv); }

}  // namespace grok::cpu::attention

#endif
