// Attention of bf16 queries over bf16 or e4m3 pages on AVX-512 BF16. Scores use vdpbf16ps, whose products are exact
// in fp32. Probabilities stay in fp32 and multiply values widened to fp32: split into two bf16 numbers each they
// would cost as much. A row of the sums holds, of every 32 columns, the 16 even ones and then the 16 odd ones, as a
// register of bf16 widens.

#include "cpu/attention/tile.h"
#include "cpu/avx512.h"
#include "cpu/bf16_bytes.h"

#if GROK_X86

namespace grok::cpu::attention {
namespace {

// The low and the high bf16 number of each 32-bit lane, as fp32.
GROK_AVX512_BF16 inline __m512 low_avx512(__m512i pairs) { return _mm512_castsi512_ps(_mm512_slli_epi32(pairs, 16)); }
GROK_AVX512_BF16 inline __m512 high_avx512(__m512i pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(static_cast<int>(0xffff0000u))));
}

// Converts a row of c e4m3 codes to bf16; zeros up to `width`.
GROK_AVX512_BF16 void widen_row_avx512(const uint8_t* codes, int64_t c, int64_t width, uint16_t* y) {
  const __m512i low0 = _mm512_load_si512(kE4m3Bytes.low), low1 = _mm512_load_si512(kE4m3Bytes.low + 64);
  const __m512i high0 = _mm512_load_si512(kE4m3Bytes.high), high1 = _mm512_load_si512(kE4m3Bytes.high + 64);
  // undoes that the unpacks below work in 128-bit lanes
  const __m512i halves = _mm512_setr_epi64(0, 4, 1, 5, 2, 6, 3, 7);
  for (int64_t i = 0; i < width; i += 64) {
    const __mmask64 valid = c - i >= 64 ? ~__mmask64{0} : (__mmask64{1} << (c - i)) - 1;
    const __m512i code = _mm512_permutexvar_epi64(halves, _mm512_maskz_loadu_epi8(valid, codes + i));
    const __m512i low = _mm512_permutex2var_epi8(low0, code, low1);  // looks up 7 bits
    const __m512i sign = _mm512_and_si512(code, _mm512_set1_epi8(static_cast<char>(0x80)));
    const __m512i high = _mm512_or_si512(_mm512_permutex2var_epi8(high0, code, high1), sign);
    _mm512_storeu_si512(y + i, _mm512_unpacklo_epi8(low, high));
    if (i + 32 < width) _mm512_storeu_si512(y + i + 32, _mm512_unpackhi_epi8(low, high));
  }
}

// Copies a row of c bf16 numbers; zeros up to `width`.
GROK_AVX512_BF16 void pad_row_avx512(const uint16_t* row, int64_t c, int64_t width, uint16_t* y) {
  for (int64_t i = 0; i < width; i += 32) {
    const __mmask32 valid = c - i >= 32 ? ~__mmask32{0} : (__mmask32{1} << (c - i)) - 1;
    _mm512_storeu_si512(y + i, _mm512_maskz_loadu_epi16(valid, row + i));
  }
}

GROK_AVX512_BF16 void stage_row_avx512(DType type, const void* row, int64_t c, int64_t width, uint16_t* y) {
  if (type == DType::bf16) return pad_row_avx512(static_cast<const uint16_t*>(row), c, width, y);
  widen_row_avx512(static_cast<const uint8_t*>(row), c, width, y);
}

// Asks for part of a row of the next block. Neither pages nor what follows read in an order that the CPU foresees; and
// the requests are spread over the work on this block, since of a burst most would wait.
GROK_AVX512_BF16 inline void prefetch_avx512(const void* row, int64_t from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) _mm_prefetch(static_cast<const char*>(row) + from + i, _MM_HINT_T1);
}

// Transposes pairs of columns: y[i * kBlock + j] is pair i of row j. Prefetches the next block's keys.
GROK_AVX512_BF16 void transpose_avx512(const void* const* rows, int64_t width, uint32_t* y, const void* const* next,
                                       int64_t bytes) {
  const auto quarter = [](const void* row, int64_t at) GROK_AVX512_BF16 {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(static_cast<const char*>(row) + at));
  };
  for (int64_t j = 0; j < kBlock; j += 16) {
    for (int64_t i = 0; i < width / 2; i += 4) {
      if (i < 64) prefetch_avx512(next[j + i / 4], 0, bytes);
      __m512i x[4];  // 128-bit lane k of x[n] is of row 4k + n: it remains to transpose 4 × 4 in each lane
      for (int n = 0; n < 4; ++n) {
        x[n] = _mm512_castsi128_si512(quarter(rows[j + n], 4 * i));
        x[n] = _mm512_inserti32x4(x[n], quarter(rows[j + 4 + n], 4 * i), 1);
        x[n] = _mm512_inserti32x4(x[n], quarter(rows[j + 8 + n], 4 * i), 2);
        x[n] = _mm512_inserti32x4(x[n], quarter(rows[j + 12 + n], 4 * i), 3);
      }
      const __m512i a = _mm512_unpacklo_epi32(x[0], x[1]), b = _mm512_unpacklo_epi32(x[2], x[3]);
      const __m512i c = _mm512_unpackhi_epi32(x[0], x[1]), d = _mm512_unpackhi_epi32(x[2], x[3]);
      _mm512_store_si512(y + (i + 0) * kBlock + j, _mm512_unpacklo_epi64(a, b));
      _mm512_store_si512(y + (i + 1) * kBlock + j, _mm512_unpackhi_epi64(a, b));
      _mm512_store_si512(y + (i + 2) * kBlock + j, _mm512_unpacklo_epi64(c, d));
      _mm512_store_si512(y + (i + 3) * kBlock + j, _mm512_unpackhi_epi64(c, d));
    }
  }
}

template <int rows>
GROK_AVX512_BF16 void scores_avx512(const uint32_t* q, const uint32_t* keys, int64_t width, float* s) {
  constexpr int kVectors = kBlock / 16;
  __m512 sums[rows][kVectors];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_setzero_ps();
  }
  for (int64_t i = 0; i < width / 2; ++i) {
    __m512bh k[kVectors];
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      k[v] = reinterpret_cast<__m512bh>(_mm512_load_si512(keys + i * kBlock + 16 * v));
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      const __m512bh pair = reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(q[r * (width / 2) + i])));
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], pair, k[v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) _mm512_store_ps(s + r * kBlock + 16 * v, sums[r][v]);
  }
}

// Of 32 · halves columns.
template <int rows, int halves>
GROK_AVX512_BF16 void accumulate_avx512(const Workspace& w, int64_t column, int64_t from, int64_t to, float* out,
                                        int64_t width) {
  const float* p = w.scores;
  constexpr int kVectors = 2 * halves;
  __m512 sums[rows][kVectors];
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      sums[r][v] = _mm512_mul_ps(_mm512_loadu_ps(out + r * width + column + 16 * v), _mm512_set1_ps(w.keep[r]));
    }
  }
  for (int64_t j = from; j < to; ++j) {
    const uint16_t* row = static_cast<const uint16_t*>(w.block->v[j]) + column;
    prefetch_avx512(w.next->v[j], column * w.element, 32 * halves * w.element);
    __m512 x[kVectors];
#pragma GCC unroll 2
    for (int h = 0; h < halves; ++h) {
      const __m512i pairs = _mm512_loadu_si512(row + 32 * h);
      x[2 * h] = low_avx512(pairs);
      x[2 * h + 1] = high_avx512(pairs);
    }
#pragma GCC unroll 6
    for (int r = 0; r < rows; ++r) {
      const __m512 weight = _mm512_set1_ps(p[r * kBlock + j]);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) sums[r][v] = _mm512_fmadd_ps(weight, x[v], sums[r][v]);
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) _mm512_storeu_ps(out + r * width + column + 16 * v, sums[r][v]);
  }
}

template <int rows>
GROK_AVX512_BF16 void accumulate_avx512(const Workspace& w, int64_t from, int64_t to, float* out, int64_t width) {
  int64_t column = 0;
  for (; column + 64 <= width; column += 64) {
    accumulate_avx512<rows, 2>(w, column, from, to, out, width);
  }
  if (column < width) accumulate_avx512<rows, 1>(w, column, from, to, out, width);
}

struct Bf16Path {
  static constexpr bool kFused = true;
  static constexpr int64_t kRows = 6;  // 6 · 4 sums of 16 keys fill 24 of 32 registers

  GROK_INLINE static float fold_max(float* m) { return attention::fold_max<kLanes>(m); }
  GROK_INLINE static float fold_sum(float* m) { return attention::fold_sum<kLanes>(m); }

  GROK_INLINE static void load_query(const PagedAttention& p, const void* q, float* queries, int64_t r) {
    const int64_t width = padded(p.head_size);
    uint16_t* row = reinterpret_cast<uint16_t*>(queries) + r * width;
    pad_row_avx512(static_cast<const uint16_t*>(q), p.head_size, width, row);
  }

  GROK_INLINE static void load_block(const PagedAttention& p, Workspace& w) {
    const int64_t width = padded(p.head_size);
    if (p.kv_type == DType::e4m3 || width != p.head_size) {
      uint16_t* k = reinterpret_cast<uint16_t*>(w.staged);
      uint16_t* v = reinterpret_cast<uint16_t*>(w.values);
      for (int64_t j = 0; j < kBlock; ++j, k += width, v += width) {
        stage_row_avx512(p.kv_type, w.block->k[j], p.head_size, width, k);
        stage_row_avx512(p.kv_type, w.block->v[j], p.head_size, width, v);
        w.block->k[j] = k;
        w.block->v[j] = v;
      }
    }
    transpose_avx512(w.block->k, width, reinterpret_cast<uint32_t*>(w.keys), w.next->k, p.head_size * w.element);
  }

  GROK_INLINE static void scores(Workspace& w, int64_t row, int64_t rows, int64_t width) {
    const uint32_t* q = reinterpret_cast<const uint32_t*>(w.queries) + row * width / 2;
    const uint32_t* keys = reinterpret_cast<const uint32_t*>(w.keys);
    switch (rows) {
      case 1: return scores_avx512<1>(q, keys, width, w.scores);
      case 2: return scores_avx512<2>(q, keys, width, w.scores);
      case 3: return scores_avx512<3>(q, keys, width, w.scores);
      case 4: return scores_avx512<4>(q, keys, width, w.scores);
      case 5: return scores_avx512<5>(q, keys, width, w.scores);
      default: return scores_avx512<kRows>(q, keys, width, w.scores);
    }
  }

  GROK_INLINE static void accumulate(const Workspace& w, int64_t /*row*/, int64_t rows, int64_t from, int64_t to,
                                     float* out, int64_t width) {
    switch (rows) {
      case 1: return accumulate_avx512<1>(w, from, to, out, width);
      case 2: return accumulate_avx512<2>(w, from, to, out, width);
      case 3: return accumulate_avx512<3>(w, from, to, out, width);
      case 4: return accumulate_avx512<4>(w, from, to, out, width);
      case 5: return accumulate_avx512<5>(w, from, to, out, width);
      default: return accumulate_avx512<kRows>(w, from, to, out, width);
    }
  }

  GROK_INLINE static void store(const PagedAttention& p, const float* out, float total, void* y) {
    const float divisor = total < 0.5f ? 0.5f : total;  // at least 1 wherever a score is not −inf
    BF16* row = static_cast<BF16*>(y);
    for (int64_t at = 0; at < p.head_size; at += 32) {
      float x[32];
      for (int i = 0; i < 16; ++i) x[2 * i] = out[at + i], x[2 * i + 1] = out[at + 16 + i];
      divide(x, divisor, std::min<int64_t>(32, p.head_size - at), row + at);
    }
  }
};

GROK_AVX512_BF16 void attend_avx512_bf16(const PagedAttention& p, const Piece& piece, const Piece* next) {
  attend<Bf16Path>(p, piece, next);
}
GROK_AVX512_BF16 void merge_avx512_bf16(const PagedAttention& p, const Piece& tile) { merge_spans<Bf16Path>(p, tile); }

}  // namespace

Kernel bf16_kernel() { return {attend_avx512_bf16, merge_avx512_bf16}; }

}  // namespace grok::cpu::attention

#endif
