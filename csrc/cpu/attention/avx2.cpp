// Attention over bf16 or e4m3 pages on AVX2, in fp32. Keys are transposed as numbers of 16 bits and widened in the
// inner loops: a block of fp32 keys would fill the L1 cache. bf16 pages hold such numbers; e4m3 codes become fp16
// numbers of 2⁻⁸ times their value, exactly, by one shift of their bits, and the scales of their rows take 2⁸.
//
// A row of the sums over bf16 values holds, of every 16 columns, the 8 even ones and then the 8 odd ones, as a register
// of bf16 widens.

#include "cpu/attention/tile.h"
#include "cpu/fp8.h"

#if GROK_X86

#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"  // GCC 12's own header, PR 105593
#include <immintrin.h>
#pragma GCC diagnostic pop

namespace grok::cpu::attention {
namespace {

constexpr int64_t kRows = 6;  // rows that share a load of keys

GROK_AVX2 inline __m128i load_128(const void* from) { return _mm_loadu_si128(static_cast<const __m128i*>(from)); }
GROK_AVX2 inline __m256i load_256(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }

// The low and the high bf16 number of each 32-bit lane, as fp32.
GROK_AVX2 inline __m256 low_bf16(__m256i pairs) { return _mm256_castsi256_ps(_mm256_slli_epi32(pairs, 16)); }
GROK_AVX2 inline __m256 high_bf16(__m256i pairs) {
  return _mm256_castsi256_ps(_mm256_and_si256(pairs, _mm256_set1_epi32(static_cast<int>(0xffff0000u))));
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
GROK_AVX2 void convert_values_avx2(const void* const* rows, int64_t width, uint16_t* y) {
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
GROK_AVX2 void transpose_bf16(const void* const* rows, int64_t width, char* y) {
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
GROK_AVX2 void transpose_e4m3_avx2(const void* const* rows, int64_t width, char* y) {
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

GROK_AVX2 inline void prefetch_avx2(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(static_cast<const char*>(row) + i, _MM_HINT_T0);
}

// w.keys: 4 · kBlock bytes for each pair of columns. With `ahead`, prefetches this block's values, which are needed
// next: pages of one key head may share few sets of L2, so that a whole block ahead would be evicted. The requests are
// spread over the work, since of a burst most would wait.
template <int rows, bool half, bool ahead>
GROK_AVX2 __attribute__((noinline)) void scores_avx2(Workspace& w, const float* q, int64_t width, int64_t row_bytes) {
  constexpr int kVectors = rows == 1 ? 8 : rows <= 3 ? 4 : 2;
  constexpr int kKeys = 8 * kVectors, kSteps = 16;  // width is a multiple of 32
  for (int64_t at = 0; at < kBlock; at += kKeys) {
    __m256 sums[rows][kVectors];
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm256_setzero_ps();
    }
    const char* k = reinterpret_cast<const char*>(w.keys) + (half ? 2 : 4) * at;
    const float* x = q;
    for (int step = 0; step < kSteps; ++step) {
      if constexpr (ahead) {
#pragma GCC unroll 4
        for (int n = 0; n < kKeys / kSteps; ++n) prefetch_avx2(w.block->v[at + step * (kKeys / kSteps) + n], row_bytes);
      }
      for (int64_t i = 0; i < width / (2 * kSteps); ++i, k += 4 * kBlock, x += 2 * kRows) {
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; ++odd) {
          __m256 key[kVectors];
#pragma GCC unroll 8
          for (int v = 0; v < kVectors; ++v) {
            if constexpr (half) {
              key[v] = _mm256_cvtph_ps(load_128(k + 2 * kBlock * odd + 16 * v));
            } else {
              key[v] = odd ? high_bf16(load_256(k + 32 * v)) : low_bf16(load_256(k + 32 * v));
            }
          }
#pragma GCC unroll 6
          for (int r = 0; r < rows; ++r) {
            const __m256 value = _mm256_broadcast_ss(x + kRows * odd + r);
#pragma GCC unroll 8
            for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm256_fmadd_ps(value, key[v], sums[r][v]);
          }
        }
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) _mm256_store_ps(w.scores + r * kBlock + at + 8 * v, sums[r][v]);
    }
  }
}

// Of 16 · kPairs columns. With `ahead`, prefetches the keys of the next block.
template <int rows, bool half, bool ahead, int kPairs>
GROK_AVX2 __attribute__((noinline)) void accumulate_avx2(const Workspace& w, int64_t column, int64_t from, int64_t to,
                                                         float* out, int64_t width) {
  constexpr int kVectors = 2 * kPairs;
  __m256 sums[rows][kVectors];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
    const __m256 keep = _mm256_broadcast_ss(w.keep + r);
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = _mm256_mul_ps(_mm256_loadu_ps(out + r * width + column + 8 * v), keep);
    }
  }
  const char* staged = reinterpret_cast<const char*>(w.values) + 2 * column;
  const int64_t offset = column * w.element, lines = offset % 64 ? 0 : 16 * kPairs * w.element;
  for (int64_t j = from; j < to; ++j) {
    if constexpr (ahead) prefetch_avx2(static_cast<const char*>(w.next->k[j]) + offset, lines);
    const char* row = half ? staged + 2 * j * width : static_cast<const char*>(w.block->v[j]) + 2 * column;
    __m256 value[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kPairs; ++v) {
      if constexpr (half) {
        value[2 * v] = _mm256_cvtph_ps(load_128(row + 32 * v));
        value[2 * v + 1] = _mm256_cvtph_ps(load_128(row + 32 * v + 16));
      } else {
        value[2 * v] = low_bf16(load_256(row + 32 * v));
        value[2 * v + 1] = high_bf16(load_256(row + 32 * v));
      }
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      const __m256 weight = _mm256_broadcast_ss(w.scores + r * kBlock + j);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm256_fmadd_ps(weight, value[v], sums[r][v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) _mm256_storeu_ps(out + r * width + column + 8 * v, sums[r][v]);
  }
}

template <int rows, bool half, bool ahead>
GROK_AVX2 void accumulate_avx2(const Workspace& w, int64_t from, int64_t to, float* out, int64_t width) {
  constexpr int kPairs = rows == 1 ? 4 : rows <= 3 ? 2 : 1;
  int64_t column = 0;
  for (; column + 16 * kPairs <= width; column += 16 * kPairs) {
    accumulate_avx2<rows, half, ahead, kPairs>(w, column, from, to, out, width);
  }
  if (kPairs == 4 && column < width) accumulate_avx2<rows, half, ahead, 2>(w, column, from, to, out, width);
}

template <bool half>
struct Avx2Path {
  static constexpr bool kFused = true;
  static constexpr int64_t kRows = attention::kRows;

  GROK_INLINE static float fold_max(float* m) { return attention::fold_max<kLanes>(m); }
  GROK_INLINE static float fold_sum(float* m) { return attention::fold_sum<kLanes>(m); }

  GROK_INLINE static void load_query(const PagedAttention& p, const void* q, float* queries, int64_t r) {
    load_column<kRows>(p, q, queries, r);
  }

  GROK_INLINE static void load_block(const PagedAttention& p, Workspace& w) {
    const int64_t width = padded(p.head_size);
    if (width != p.head_size) pad_rows(w, p.head_size, width);
    char* keys = reinterpret_cast<char*>(w.keys);
    if constexpr (half) {
      uint16_t* values = reinterpret_cast<uint16_t*>(w.values);
      const bool nans = has_nan(w.block->k, width) || has_nan(w.block->v, width);
      (nans ? transpose_e4m3_avx2<true> : transpose_e4m3_avx2<false>)(w.block->k, width, keys);
      (nans ? convert_values_avx2<true> : convert_values_avx2<false>)(w.block->v, width, values);
      for (int64_t j = 0; j < kBlock; ++j) w.block->k_scale[j] *= 256.0f, w.block->v_scale[j] *= 256.0f;
    } else {
      transpose_bf16(w.block->k, width, keys);
    }
  }

  template <int rows>
  GROK_INLINE static void scores_of(Workspace& w, int64_t row, int64_t width) {
    const float* q = w.queries + row * width;
    if (row == 0) return scores_avx2<rows, half, true>(w, q, width, w.row_bytes);
    scores_avx2<rows, half, false>(w, q, width, w.row_bytes);
  }

  GROK_INLINE static void scores(Workspace& w, int64_t row, int64_t rows, int64_t width) {
    switch (rows) {
      case 1: return scores_of<1>(w, row, width);
      case 2: return scores_of<2>(w, row, width);
      case 3: return scores_of<3>(w, row, width);
      case 4: return scores_of<4>(w, row, width);
      case 5: return scores_of<5>(w, row, width);
      default: return scores_of<kRows>(w, row, width);
    }
  }

  template <int rows>
  GROK_INLINE static void accumulate_of(const Workspace& w, int64_t row, int64_t from, int64_t to, float* out,
                                        int64_t width) {
    if (row == 0) return accumulate_avx2<rows, half, true>(w, from, to, out, width);
    accumulate_avx2<rows, half, false>(w, from, to, out, width);
  }

  GROK_INLINE static void accumulate(const Workspace& w, int64_t row, int64_t rows, int64_t from, int64_t to,
                                     float* out, int64_t width) {
    switch (rows) {
      case 1: return accumulate_of<1>(w, row, from, to, out, width);
      case 2: return accumulate_of<2>(w, row, from, to, out, width);
      case 3: return accumulate_of<3>(w, row, from, to, out, width);
      case 4: return accumulate_of<4>(w, row, from, to, out, width);
      case 5: return accumulate_of<5>(w, row, from, to, out, width);
      default: return accumulate_of<kRows>(w, row, from, to, out, width);
    }
  }

  GROK_INLINE static void store(const PagedAttention& p, const float* out, float total, void* y) {
    store_row<8, !half>(p, out, total, y);
  }
};

GROK_AVX2 void attend_avx2_bf16(const PagedAttention& p, const Piece& piece, const Piece* next) {
  attend<Avx2Path<false>>(p, piece, next);
}
GROK_AVX2 void attend_avx2_e4m3(const PagedAttention& p, const Piece& piece, const Piece* next) {
  attend<Avx2Path<true>>(p, piece, next);
}
GROK_AVX2 void merge_avx2_bf16(const PagedAttention& p, const Piece& tile) { merge_spans<Avx2Path<false>>(p, tile); }
GROK_AVX2 void merge_avx2_e4m3(const PagedAttention& p, const Piece& tile) { merge_spans<Avx2Path<true>>(p, tile); }

}  // namespace

Kernel avx2_kernel(DType kv) {
  if (kv == DType::e4m3) return {attend_avx2_e4m3, merge_avx2_e4m3};
  return {attend_avx2_bf16, merge_avx2_bf16};
}

}  // namespace grok::cpu::attention

#endif
