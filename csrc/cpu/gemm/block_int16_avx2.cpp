// Path::int16: int8 rows times int8 weights, exactly, where there is no vpdpbusd or groups of scales are too small for
// it. Rows are packed as pairs of 16 bits; weights become such pairs in registers, the even and the odd columns of a
// run of 4, and vpmaddwd multiplies.
//
//   c += row scale · Σ (x · w) of each segment, or S · that where the weights have several groups of scales
//
// A segment is the columns, 128 at most, that share the scales of the weight and of the row.

#include "cpu/gemm/block_product.h"
#include "cpu/gemm/group_scales.h"

#if GROK_X86
#include <immintrin.h>

namespace grok::cpu {
namespace {

constexpr int64_t kAhead = 4096;  // bytes that the first tile of a row block prefetches ahead

template <int kRows>
GROK_AVX2 void int16_tile_avx2(const BlockProduct& b, const PackedRows::Tile& t, const float* s, int64_t ahead) {
  constexpr int kWide = kRows == 1 ? 8 : kRows == 2 ? 4 : 2;
  const PackedRows& p = *b.x;
  const int64_t segment = std::min(b.weights->group(), kScaleGroup);
  const uint32_t* x = p.at(t, b.column / 2);
  float* c = b.c + (t.row - b.rows->row) * kPanel;
  for (int64_t k = 0; k < b.columns; k += segment, s += kPanel) {
    const int64_t end = std::min(k + segment, b.columns);
    const float* row_scale = p.scales + t.row * p.groups + (b.column + k) / kScaleGroup;
    for (int64_t from = 0; from < kPanel; from += 8 * kWide) {
      __m256i sum[kRows][kWide];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int j = 0; j < kWide; ++j) sum[r][j] = _mm256_setzero_si256();
      }
      for (int64_t at = k; at < end; at += 4) {
        const uint8_t* w = b.w + at / 4 * kRunBytes + 4 * from;
        const uint32_t* pair = x + at / 2 * kRows;
        __m256i v[kWide];
#pragma GCC unroll 8
        for (int j = 0; j < kWide; ++j) {
          v[j] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(w + 32 * j));
          if (j % 2 == 0) _mm_prefetch(w + 32 * j + ahead, _MM_HINT_T0);
        }
#pragma GCC unroll 2
        for (int odd = 0; odd < 2; ++odd, pair += kRows) {
          __m256i two[kWide];
#pragma GCC unroll 8
          for (int j = 0; j < kWide; ++j) two[j] = _mm256_srai_epi16(odd ? v[j] : _mm256_slli_epi16(v[j], 8), 8);
#pragma GCC unroll 8
          for (int r = 0; r < kRows; ++r) {
            const __m256i value = _mm256_set1_epi32(static_cast<int>(pair[r]));
#pragma GCC unroll 8
            for (int j = 0; j < kWide; ++j) {
              sum[r][j] = _mm256_add_epi32(sum[r][j], _mm256_madd_epi16(two[j], value));
              asm("" : "+x"(sum[r][j]));  // else the compiler reorders the sums, and spills products to memory
            }
          }
        }
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m256 scale = _mm256_set1_ps(row_scale[r * p.groups]);
#pragma GCC unroll 8
        for (int j = 0; j < kWide; ++j) {
          float* to = c + r * kPanel + from + 8 * j;
          __m256 value = _mm256_cvtepi32_ps(sum[r][j]);
          if (b.scaled) value = _mm256_mul_ps(value, _mm256_loadu_ps(s + from + 8 * j));
          const __m256 before = b.first && k == 0 ? _mm256_setzero_ps() : _mm256_loadu_ps(to);
          _mm256_storeu_ps(to, _mm256_fmadd_ps(value, scale, before));
        }
      }
    }
  }
}

constexpr decltype(&int16_tile_avx2<1>) kTiles[] = {int16_tile_avx2<1>, int16_tile_avx2<2>, int16_tile_avx2<3>,
                                                    int16_tile_avx2<4>, int16_tile_avx2<5>, int16_tile_avx2<6>};

}  // namespace

void int16_block_avx2(const BlockProduct& b) {
  const Weights& w = *b.weights;
  float* s = static_cast<float*>(b.stage);
  const int64_t segment = std::min(w.group(), kScaleGroup);
  static_assert(kRunBlock * 2 / 4 * kPanel * sizeof(float) <= kStageBytes);
  if (b.scaled) {
    for (int64_t k = 0; k < b.columns; k += segment) {
      plane_values(w, w.scales, b.expert, b.output, (b.column + k) / w.group(), b.x->isa, s + k / segment * kPanel);
    }
  }
  for (int64_t i = b.rows->first_tile; i < b.rows->last_tile; ++i) {
    const PackedRows::Tile& t = b.x->tiles[i];
    kTiles[t.rows - 1](b, t, s, i == b.rows->first_tile ? kAhead : 0);
  }
}

}  // namespace grok::cpu
#endif
