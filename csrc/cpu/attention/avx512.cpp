// Attention over bf16 or e4m3 pages on AVX-512, in fp32. As on AVX2 (avx2.cpp), keys are transposed as numbers of 16
// bits and widened in the inner loops, e4m3 codes become fp16 numbers of 2⁻⁸ times their value, and their scales take
// 2⁸. Other than there, rows are prefetched a whole block ahead.
//
// A row of the sums over bf16 values holds, of every 32 columns, the 16 even ones and then the 16 odd ones, as a
// register of bf16 widens.

#include "cpu/attention/tile.h"
#include "cpu/avx512.h"
#include "cpu/fp8.h"

#if GROK_X86

namespace grok::cpu::attention {
namespace {

using Vec = __m512;
constexpr int kWidth = 16;
constexpr int64_t kRowsAtOnce = 12;  // of prompts: a widened register of keys or values serves 12 sums
constexpr int score_vectors(int rows) { return rows <= 6 ? 4 : 2; }
constexpr int value_pairs(int rows) { return rows <= 6 ? 2 : 1; }
constexpr int kLoadAhead = 32, kScoresAhead = 48;  // of 128 rows ahead: load_block and scores prefetch so many

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
GROK_AVX512 inline __m512i halves_avx512(__m512i words) {
  const __m512i half = _mm512_and_si512(_mm512_srai_epi16(words, 1), _mm512_set1_epi16(static_cast<int16_t>(0xbf80)));
  // only NaN carries into bit 14, the top of the exponent of fp16
  const __m512i next = _mm512_add_epi16(half, _mm512_set1_epi16(0x80));
  return _mm512_ternarylogic_epi32(half, next, _mm512_set1_epi16(0x4000), 0xf8);  // half | (next & 0x4000)
}

GROK_AVX512 void convert_values_avx512(Workspace& w, int64_t width, uint16_t* y) {
  const void* const* rows = w.block->v;
  for (int64_t j = 0; j < kBlock; ++j, y += width) {
    if (j % 4 == 0) prefetch_rows(w, 1);
    for (int64_t c = 0; c < width; c += 32) {
      const __m512i codes = _mm512_cvtepu8_epi16(load_256(static_cast<const char*>(rows[j]) + c));
      _mm512_store_si512(y + c, halves_avx512(_mm512_slli_epi16(codes, 8)));
    }
  }
}

// 16 bytes of each of four rows.
GROK_AVX512 inline __m512i load_quarters_avx512(const void* const* rows, int64_t step, int64_t at) {
  const auto part = [&](int64_t i) GROK_AVX512 {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const char*>(rows[i * step]) + at));
  };
  const __m512i one = _mm512_castsi128_si512(part(0)), two = _mm512_inserti32x4(one, part(1), 1);
  return _mm512_inserti32x4(_mm512_inserti32x4(two, part(2), 2), part(3), 3);
}

// Transposes 4 × 4 dwords in each quarter of x, and gives y[i] the register of dword i.
GROK_AVX512 inline void transpose_quarters_avx512(const __m512i* x, __m512i* y) {
  const __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpacklo_epi32(x[2], x[3]);
  const __m512i c = _mm512_unpackhi_epi32(x[0], x[1]), d = _mm512_unpackhi_epi32(x[2], x[3]);
  y[0] = _mm512_unpacklo_epi64(a, b);
  y[1] = _mm512_unpackhi_epi64(a, b);
  y[2] = _mm512_unpacklo_epi64(c, d);
  y[3] = _mm512_unpackhi_epi64(c, d);
}

// bf16 keys: pair i of columns of key j goes to dword i · kBlock + j. 16 pairs at a time save loads of addresses.
GROK_AVX512 void transpose_bf16_avx512(Workspace& w, int64_t width, char* y) {
  const void* const* rows = w.block->k;
  for (int64_t j = 0; j < kBlock; j += 16) {
    for (int64_t i = 0; i < width / 2; i += 16) {
      prefetch_rows(w, std::max<int64_t>(1, kLoadAhead * 8 / width));
      __m512i x[4][4], z[4];  // quarter k of x[·][n] is of key j + 4k + n
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) {
#pragma GCC unroll 4
        for (int part = 0; part < 4; ++part) x[part][n] = load_quarters_avx512(rows + j + n, 4, 4 * i + 16 * part);
      }
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) {
        transpose_quarters_avx512(x[part], z);
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) _mm512_store_si512(y + 4 * ((i + 4 * part + n) * kBlock + j), z[n]);
      }
    }
  }
}

// e4m3 keys: column c of key j goes, as fp16, to word c · kBlock + j. 32 columns at a time.
GROK_AVX512 void transpose_e4m3_avx512(Workspace& w, int64_t width, char* y) {
  const void* const* rows = w.block->k;
  for (int64_t j = 0; j < kBlock; j += 32) {
    for (int64_t c = 0; c < width; c += 32) {
      prefetch_rows(w, std::max<int64_t>(1, kLoadAhead * 8 / width));
      __m512i x[4][4], z[4];  // pairs of columns of two keys, interleaved: quarter k of x[·][n] is of key j + 8k + 2n
#pragma GCC unroll 4
      for (int n = 0; n < 4; ++n) {
#pragma GCC unroll 2
        for (int part = 0; part < 4; part += 2) {
          const __m512i a = load_quarters_avx512(rows + j + 2 * n, 8, c + 8 * part);
          const __m512i b = load_quarters_avx512(rows + j + 2 * n + 1, 8, c + 8 * part);
          x[part][n] = _mm512_unpacklo_epi16(a, b);
          x[part + 1][n] = _mm512_unpackhi_epi16(a, b);
        }
      }
#pragma GCC unroll 4
      for (int part = 0; part < 4; ++part) {
        transpose_quarters_avx512(x[part], z);
#pragma GCC unroll 4
        for (int n = 0; n < 4; ++n) {
          char* to = y + 2 * ((c + 8 * part + 2 * n) * kBlock + j);
          _mm512_store_si512(to, halves_avx512(_mm512_slli_epi16(z[n], 8)));
          _mm512_store_si512(to + 2 * kBlock, halves_avx512(z[n]));
        }
      }
    }
  }
}

// w.keys: 4 · kBlock bytes for each pair of columns.
template <int rows, bool half>
GROK_AVX512 __attribute__((noinline)) void scores_f32_avx512(Workspace& w, const float* q, int64_t width) {
  constexpr int kVectors = score_vectors(rows), kKeys = kWidth * kVectors;
  constexpr int kSteps = 16, kAhead = std::max<int>(1, kKeys * kScoresAhead / kSteps / kBlock);
  const int64_t pairs = width / (2 * kSteps);
  const bool ahead = w.ahead < 2 * kBlock;
  for (int64_t at = 0; at < kBlock; at += kKeys) {
    Vec sums[rows][kVectors];
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[r][v] = zero();
    }
    const char* k = reinterpret_cast<const char*>(w.keys) + (half ? 2 : 4) * at;
    const float* x = q;
    for (int step = 0; step < kSteps; ++step) {
      for (int64_t i = 0; i < pairs; ++i, k += 4 * kBlock, x += 2 * kRowsAtOnce) {
        if (ahead) {
          for (int64_t n = i; n < kAhead; n += pairs) prefetch_rows(w, 1);
        }
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; ++odd) {
          Vec key[kVectors];
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) {
            if constexpr (half) {
              key[v] = widen_half(k + 2 * kBlock * odd + 2 * kWidth * v);
            } else {
              key[v] = odd ? high_bf16(k + 4 * kWidth * v) : low_bf16(k + 4 * kWidth * v);
            }
          }
#pragma GCC unroll 12
          for (int r = 0; r < rows; ++r) {
            const Vec value = splat(x + kRowsAtOnce * odd + r);
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) sums[r][v] = add_product(sums[r][v], value, key[v]);
          }
        }
      }
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) store(w.scores + r * kBlock + at + kWidth * v, sums[r][v]);
    }
  }
}

// Of 2 · kWidth · kPairs columns.
template <int rows, bool half, int kPairs>
GROK_AVX512 __attribute__((noinline)) void accumulate_f32_avx512(Workspace& w, int64_t column, int64_t from, int64_t to,
                                                                  float* out, int64_t width) {
  constexpr int kVectors = 2 * kPairs;
  Vec sums[rows][kVectors];
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) {
    const Vec keep = splat(w.keep + r);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = multiply(load(out + r * width + column + kWidth * v), keep);
    }
  }
  const char* staged = reinterpret_cast<const char*>(w.values) + 2 * column;
  const int64_t passes = width / (2 * kWidth * kPairs);  // over the block's values
  int64_t wait = passes;
  const bool ahead = w.ahead < 2 * kBlock;
  for (int64_t j = from; j < to; ++j) {
    if (ahead && --wait == 0) prefetch_rows(w, 1), wait = passes;
    const char* row = half ? staged + 2 * j * width : static_cast<const char*>(w.block->v[j]) + 2 * column;
    Vec value[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kPairs; ++v) {
      const char* pair = row + 4 * kWidth * v;
      value[2 * v] = half ? widen_half(pair) : low_bf16(pair);
      value[2 * v + 1] = half ? widen_half(pair + 2 * kWidth) : high_bf16(pair);
    }
#pragma GCC unroll 12
    for (int r = 0; r < rows; ++r) {
      const Vec weight = splat(w.scores + r * kBlock + j);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[r][v] = add_product(sums[r][v], weight, value[v]);
    }
  }
#pragma GCC unroll 12
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(out + r * width + column + kWidth * v, sums[r][v]);
  }
}

template <int rows, bool half>
GROK_AVX512 void accumulate_f32_avx512(Workspace& w, int64_t from, int64_t to, float* out, int64_t width) {
  constexpr int kPairs = value_pairs(rows), kColumns = 2 * kWidth * kPairs;
  int64_t column = 0;
  for (; column + kColumns <= width; column += kColumns) {
    accumulate_f32_avx512<rows, half, kPairs>(w, column, from, to, out, width);
  }
  for (; column < width; column += 32) {  // width is a multiple of 32
    accumulate_f32_avx512<rows, half, 1>(w, column, from, to, out, width);
  }
}

template <bool half>
struct Avx512Path {
  static constexpr bool kFused = true;
  static constexpr int64_t kRows = kRowsAtOnce;

  GROK_AVX512 static float fold_max(const float* m) {
    const __m256 a = _mm256_max_ps(_mm256_loadu_ps(m + 8), _mm256_loadu_ps(m));
    const __m128 b = _mm_max_ps(_mm256_extractf128_ps(a, 1), _mm256_castps256_ps128(a));
    const __m128 c = _mm_max_ps(_mm_movehl_ps(b, b), b);
    return _mm_cvtss_f32(_mm_max_ss(_mm_movehdup_ps(c), c));
  }
  GROK_AVX512 static float fold_sum(const float* m) {
    const __m256 a = _mm256_add_ps(_mm256_loadu_ps(m), _mm256_loadu_ps(m + 8));
    const __m128 b = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
    const __m128 c = _mm_add_ps(b, _mm_movehl_ps(b, b));
    return _mm_cvtss_f32(_mm_add_ss(c, _mm_movehdup_ps(c)));
  }

  GROK_INLINE static void load_query(const PagedAttention& p, const void* q, float* queries, int64_t r) {
    load_column<kRows>(p, q, queries, r);
  }

  GROK_INLINE static void load_block(const PagedAttention& p, Workspace& w) {
    const int64_t width = padded(p.head_size);
    if (width != p.head_size) pad_rows(w, p.head_size, width);
    char* keys = reinterpret_cast<char*>(w.keys);
    if constexpr (half) {
      transpose_e4m3_avx512(w, width, keys);
      convert_values_avx512(w, width, reinterpret_cast<uint16_t*>(w.values));
      for (int64_t j = 0; j < kBlock; ++j) w.block->k_scale[j] *= 256.0f, w.block->v_scale[j] *= 256.0f;
    } else {
      transpose_bf16_avx512(w, width, keys);
    }
  }

  template <int64_t rows>
  GROK_INLINE static void scores_of(Workspace& w, int64_t row, int64_t count, int64_t width) {
    if constexpr (rows > 1) {
      if (count < rows) return scores_of<rows - 1>(w, row, count, width);
    }
    scores_f32_avx512<rows, half>(w, w.queries + row * width, width);
  }
  GROK_INLINE static void scores(Workspace& w, int64_t row, int64_t rows, int64_t width) {
    scores_of<kRows>(w, row, rows, width);
  }

  template <int64_t rows>
  GROK_INLINE static void accumulate_of(Workspace& w, int64_t count, int64_t from, int64_t to,
                                        float* out, int64_t width) {
    if constexpr (rows > 1) {
      if (count < rows) return accumulate_of<rows - 1>(w, count, from, to, out, width);
    }
    accumulate_f32_avx512<rows, half>(w, from, to, out, width);
  }
  GROK_INLINE static void accumulate(Workspace& w, int64_t /*row*/, int64_t rows, int64_t from, int64_t to,
                                     float* out, int64_t width) {
    accumulate_of<kRows>(w, rows, from, to, out, width);
  }

  GROK_INLINE static void store(const PagedAttention& p, const float* out, float total, void* y) {
    store_row<kWidth, !half>(p, out, total, y);
  }
};

template <bool half>
GROK_AVX512 void attend_pages_avx512(const PagedAttention& p, const Piece& piece, const Piece* next) {
  attend<Avx512Path<half>>(p, piece, next);
}
template <bool half>
GROK_AVX512 void merge_pages_avx512(const PagedAttention& p, const Piece& tile) {
  merge_spans<Avx512Path<half>>(p, tile);
}

}  // namespace

Kernel avx512_kernel(DType kv) {
  if (kv == DType::e4m3) return {attend_pages_avx512<true>, merge_pages_avx512<true>};
  return {attend_pages_avx512<false>, merge_pages_avx512<false>};
}

}  // namespace grok::cpu::attention

#endif
