// Attention over bf16 or e4m3 pages on AVX-512, in fp32.

#include "cpu/attention/tile.h"
#include "cpu/avx512.h"
#include "cpu/fp8.h"

#if GROK_X86

namespace grok::cpu::attention {
namespace {

#define GROK_FP32 GROK_AVX512
#define GROK_FP32_NAME(NAME) NAME##_avx512

using Vec = __m512;
constexpr int kWidth = 16;
constexpr int64_t kRowsAtOnce = 12;  // of prompts: a widened register of keys or values serves 12 sums
constexpr int score_vectors(int rows) { return rows <= 6 ? 4 : 2; }
constexpr int value_pairs(int rows) { return rows <= 6 ? 2 : 1; }
constexpr int kLoadAhead = 32, kScoresAhead = 48;  // of 128 rows of the next block, prefetched by load_block and by scores

GROK_AVX512 inline __m256i load_256(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
GROK_AVX512 inline Vec load(const float* from) { return _mm512_loadu_ps(from); }
GROK_AVX512 inline void store(float* to, Vec v) { _mm512_storeu_ps(to, v); }
GROK_AVX512 inline Vec zero() { return _mm512_setzero_ps(); }
GROK_AVX512 inline Vec splat(const float* from) { return _mm512_set1_ps(*from); }
GROK_AVX512 inline Vec multiply(Vec a, Vec b) { return _mm512_mul_ps(a, b); }
GROK_AVX512 inline Vec add_product(Vec sum, Vec a, Vec b) { return _mm512_fmadd_ps(a, b, sum); }
GROK_AVX512 inline Vec widen_half(const void* from) { return _mm512_cvtph_ps(load_256(from)); }

// The low and the high bf16 number of each 32-bit lane.
GROK_AVX512 inline Vec low_bf16(const void* pairs) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(pairs), 16));
}
GROK_AVX512 inline Vec high_bf16(const void* pairs) {
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(pairs), mask));
}

// The upper byte of each word, an e4m3 code, as an fp16 number of 2⁻⁸ times its value.
GROK_AVX512 inline __m512i halves(__m512i words) {
  const __m512i half = _mm512_and_si512(_mm512_srai_epi16(words, 1), _mm512_set1_epi16(static_cast<int16_t>(0xbf80)));
  // only NaN carries into bit 14, the top of the exponent of fp16
  const __m512i next = _mm512_add_epi16(half, _mm512_set1_epi16(0x80));
  return _mm512_ternarylogic_epi32(half, next, _mm512_set1_epi16(0x4000), 0xf8);  // half | (next & 0x4000)
}

GROK_AVX512 void convert_values(Workspace& w, int64_t width, uint16_t* y) {
  const void* const* rows = w.block->v;
  for (int64_t j = 0; j < kBlock; ++j, y += width) {
    if (j % 4 == 0) prefetch_rows(w, 1);
    for (int64_t c = 0; c < width; c += 32) {
      const __m512i codes = _mm512_cvtepu8_epi16(load_256(static_cast<const char*>(rows[j]) + c));
      _mm512_store_si512(y + c, halves(_mm512_slli_epi16(codes, 8)));
    }
  }
}

// 16 bytes of each of four rows.
GROK_AVX512 inline __m512i load_quarters(const void* const* rows, int64_t step, int64_t at) {
  const auto part = [&](int64_t i) GROK_AVX512 {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const char*>(rows[i * step]) + at));
  };
  const __m512i one = _mm512_castsi128_si512(part(0)), two = _mm512_inserti32x4(one, part(1), 1);
  return _mm512_inserti32x4(_mm512_inserti32x4(two, part(2), 2), part(3), 3);
}

// Transposes 4 × 4 dwords in each quarter of x, and gives y[i] the register of dword i.
GROK_AVX512 inline void transpose_quarters(const __m512i* x, __m512i* y) {
  const __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpacklo_epi32(x[2], x[3]);
  const __m512i c = _mm512_unpackhi_epi32(x[0], x[1]), d = _mm512_unpackhi_epi32(x[2], x[3]);
  y[0] = _mm512_unpacklo_epi64(a, b);
  y[1] = _mm512_unpackhi_epi64(a, b);
  y[2] = _mm512_unpacklo_epi64(c, d);
  y[3] = _mm512_unpackhi_epi64(c, d);
}

// bf16 keys: pair i of columns of key j goes to dword i · kBlock + j. 16 pairs at a time, for fewer loads of addresses.
GROK_AVX512 void transpose_bf16(Workspace& w, int64_t width, char* y) {
  const void* const* rows = w.block->k;
  for (int64_t j = 0; j < kBlock; j += 16) {
    for (int64_t i = 0; i < width / 2; i += 16) {
      prefetch_rows(w, kLoadAhead * 8 / width);
      __m512i x[4][4], z[4];  // quarter k of x[·][n] is of key j + 4k + n
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) {
#pragma GCC unroll 4
        for (int part = 0; part < 4; ++part) x[part][n] = load_quarters(rows + j + n, 4, 4 * i + 16 * part);
      }
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) {
        transpose_quarters(x[part], z);
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) _mm512_store_si512(y + 4 * ((i + 4 * part + n) * kBlock + j), z[n]);
      }
    }
  }
}

// e4m3 keys: column c of key j goes, as fp16, to word c · kBlock + j. 32 columns at a time.
GROK_AVX512 void transpose_e4m3(Workspace& w, int64_t width, char* y) {
  const void* const* rows = w.block->k;
  for (int64_t j = 0; j < kBlock; j += 32) {
    for (int64_t c = 0; c < width; c += 32) {
      prefetch_rows(w, kLoadAhead * 8 / width);
      __m512i x[4][4], z[4];  // pairs of columns of two keys, interleaved: quarter k of x[·][n] is of key j + 8k + 2n
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) {
#pragma GCC unroll 2
        for (int part = 0; part < 4; part += 2) {
          const __m512i a = load_quarters(rows + j + 2 * n, 8, c + 8 * part);
          const __m512i b = load_quarters(rows + j + 2 * n + 1, 8, c + 8 * part);
          x[part][n] = _mm512_unpacklo_epi16(a, b);
          x[part + 1][n] = _mm512_unpackhi_epi16(a, b);
        }
      }
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) {
        transpose_quarters(x[part], z);
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) {
          char* to = y + 2 * ((c + 8 * part + 2 * n) * kBlock + j);
          _mm512_store_si512(to, halves(_mm512_slli_epi16(z[n], 8)));
          _mm512_store_si512(to + 2 * kBlock, halves(z[n]));
        }
      }
    }
  }
}

GROK_AVX512 inline void load_e4m3(Workspace& w, int64_t width, char* keys, uint16_t* values) {
  transpose_e4m3(w, width, keys);
  convert_values(w, width, values);
}

#include "cpu/attention/fp32.inl"

}  // namespace

Kernel avx512_kernel(DType kv) { return kernel_of(kv); }

}  // namespace grok::cpu::attention

#endif
