// Path::codes and Path::int8_groups by vpdpbusd, whose first operand is unsigned: int8 rows times codes of 4, 5 or 6
// bits, or times int8 weights as codes of 8 bits, w + 128, with a zero point of 128. Sums are exact integers until the
// end of a segment, where the same steps in fp32 follow as in block_codes_avx2.cpp, which gives their formula (of int8
// weights: as in block_int16_avx2.cpp). So the bits are the same too.

#include <cstring>

#include "cpu/avx512.h"
#include "cpu/gemm/codes.h"
#include "cpu/gemm/group_scales.h"
#include "cpu/gemm/prefetch.h"

#if GROK_X86

namespace grok::cpu {
namespace {

#define GROK_VNNI_INLINE GROK_AVX512_VNNI __attribute__((always_inline)) inline

constexpr int64_t kStepUnits = 2;  // of 8 columns: as many as a group has at least
constexpr int64_t kStepColumns = kStepUnits * kUnit;

// kTwo: scales of two levels. kSigned: a zero point, 2^(bits − 1), and no minima.
template <int kBits_, bool kTwo_, bool kSigned_>
struct Kind {
  static constexpr int kBits = kBits_, kZeroPoint = kSigned_ ? 1 << (kBits_ - 1) : 0;
  static constexpr bool kTwo = kTwo_, kSigned = kSigned_;
};

// Registers of 16 outputs that a pass of a tile sums: of all rows up to 24 of 32, and of two levels as many again for
// their totals. Codes of 5 bits need more for what they are made of.
constexpr int wide(int64_t rows, int bits, bool two) { return rows > 3 && (two || bits == 5) ? 2 : 4; }

// What the tiles of a row block share: the scales of a column block, for 64 outputs.
constexpr int64_t kBlockColumns = kRunBlock * 4;
struct Stage {
  float s[kBlockColumns / kLeastCodeGroup][kPanel], m[kBlockColumns / kLeastCodeGroup][kPanel];  // of each segment
  uint8_t subscale[kBlockColumns / kLeastCodeGroup][kPanel];        // of each group
  int32_t subminimum[kBlockColumns / kLeastCodeGroup / 2][kPanel];  // of two groups, in 16 bits each
};
static_assert(sizeof(Stage) <= kStageBytes);

GROK_VNNI_INLINE __m512i widen(const uint8_t* bytes, bool is_signed) {
  const __m128i values = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
  return is_signed ? _mm512_cvtepi8_epi32(values) : _mm512_cvtepu8_epi32(values);
}

GROK_AVX512_VNNI void stage_scales_avx512(const BlockProduct& b, Stage& stage) {
  const Weights& w = *b.weights;
  const int64_t segment = segment_columns(w), columns = w.k / w.scales.groups;  // that share scales of the first level
  int64_t first = b.column / columns;  // counted on: a division takes as long as the scales of a few outputs
  for (int64_t k = 0, i = 0; k < b.columns; k += segment, ++i) {
    if (b.column + k == (first + 1) * columns) ++first;
    if (w.bits && !w.subscales.data) {
      group_scales(w, b.expert, b.output, first, b.x->isa, stage.s[i], stage.m[i]);
      continue;
    }
    plane_values(w, w.scales, b.expert, b.output, first, b.x->isa, stage.s[i]);
    if (w.minima.data) plane_values(w, w.minima, b.expert, b.output, first, b.x->isa, stage.m[i]);
  }
  if (!w.subscales.data) return;
  const int64_t begin = b.column / w.group(), count = b.columns / w.group();
  uint8_t room[2][kPanel];
  const auto bytes = [&](const Plane& plane, int64_t g, int at) {
    return group_bytes(w, plane, b.expert, b.output, begin + g, room[at]);
  };
  for (int64_t g = 0; g < count; ++g) std::memcpy(stage.subscale[g], bytes(w.subscales, g, 0), kPanel);
  for (int64_t g = 0; g < count && w.minima.data; g += 2) {
    const uint8_t *low = bytes(w.subminima, g, 0), *high = bytes(w.subminima, g + 1, 1);
    for (int64_t n = 0; n < kPanel; n += 16) {
      const __m512i two = _mm512_or_si512(widen(low + n, false), _mm512_slli_epi32(widen(high + n, false), 16));
      _mm512_storeu_si512(stage.subminimum[g / 2] + n, two);
    }
  }
}

// The codes of four columns of a unit, as bytes: half 0 or 1 (kByteColumns). Of 8 bits: in the order of the columns.
template <int kBits, int kUnitOfBlock, int kHalf>
GROK_VNNI_INLINE __m512i codes(const uint8_t* w) {
  if constexpr (kBits == 8) {
    const __m512i run = _mm512_loadu_si512(w + (2 * kUnitOfBlock + kHalf) * kRunBytes);
    return _mm512_xor_si512(run, _mm512_set1_epi8(static_cast<char>(0x80)));
  } else {
    const __m512i nibble = _mm512_set1_epi8(15), low = _mm512_loadu_si512(w + kUnitOfBlock * kRunBytes);
    const __m512i code = _mm512_and_si512(kHalf ? _mm512_srli_epi32(low, 4) : low, nibble);
    if constexpr (kBits == 4) {
      return code;
    } else {
      constexpr int kDown = high_shift(kBits, kUnitOfBlock, kHalf) - 4;
      const __m512i high = _mm512_loadu_si512(w + high_run(kBits, kUnitOfBlock) * kRunBytes);
      const __m512i mask = _mm512_set1_epi8(kBits == 5 ? 0x10 : 0x30);
      // 0xea: (first & second) | third
      return _mm512_ternarylogic_epi32(shift_right<kDown>(high), mask, code, 0xea);
    }
  }
}

// Adds the products of four columns.
template <class K, int kUnitOfBlock, int kHalf, int kRows, int kWide>
GROK_VNNI_INLINE void add_run(const uint8_t* w, const uint32_t* x, __m512i (&sum)[kRows][kWide]) {
  __m512i code[kWide];
#pragma GCC unroll 4
  for (int j = 0; j < kWide; ++j) code[j] = codes<K::kBits, kUnitOfBlock, kHalf>(w + 64 * j);
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    const __m512i four = _mm512_set1_epi32(static_cast<int>(x[(2 * kUnitOfBlock + kHalf) * kRows + r]));
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) add_quads(sum[r][j], code[j], four);
  }
}

// w, x: of the block of 32 columns.
template <class K, int kFirstUnit, int kRows, int kWide>
GROK_VNNI_INLINE void add_step(const uint8_t* w, const uint32_t* x, __m512i (&sum)[kRows][kWide]) {
  add_run<K, kFirstUnit, 0>(w, x, sum);
  add_run<K, kFirstUnit, 1>(w, x, sum);
  add_run<K, kFirstUnit + 1, 0>(w, x, sum);
  add_run<K, kFirstUnit + 1, 1>(w, x, sum);
}

// Starts sums at −zero point · Σ x. sums: of each row.
template <class K, int kRows, int kWide>
GROK_VNNI_INLINE void start(const int16_t* sums, int64_t stride, __m512i (&sum)[kRows][kWide]) {
#pragma GCC unroll 6
  for (int r = 0; r < kRows; ++r) {
    const __m512i from = _mm512_set1_epi32(-K::kZeroPoint * sums[r * stride]);
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) sum[r][j] = from;
  }
}

// What a tile prefetches: so many cache lines further on with each step.
struct Lines {
  const uint8_t* from;
  int64_t count;
};

// The segments of a column block, of one tile.
template <class K, int kRows>
GROK_AVX512_VNNI void codes_tile_avx512(const BlockProduct& b, const PackedRows::Tile& t, const Stage& stage,
                                        Lines ahead) {
  constexpr int kWide = wide(kRows, K::kBits, K::kTwo);
  const Weights& w = *b.weights;
  const PackedRows& p = *b.x;
  const int64_t segment = segment_columns(w), steps = w.group() / kStepColumns, sums_each = segment / p.sum_columns;
  const bool signed_scales = w.subscales.type == ScaleType::i8;
  const uint32_t* x = p.at(t, b.column / 4);
  const int16_t* sums = p.sums + t.row * p.sum_groups + b.column / p.sum_columns;
  float* c = b.c + (t.row - b.rows->row) * kPanel;
  for (int64_t k = 0, i = 0; k < b.columns; k += segment, ++i, sums += sums_each) {
    const int64_t begin = k / kUnit, end = std::min(k + segment, b.columns) / kUnit;
    const float *s = stage.s[i], *m = stage.m[i];
    const float* row_scale = p.scales + t.row * p.groups + (b.column + k) / kScaleGroup;
    const bool first = b.first && k == 0;
    for (int64_t from = 0; from < kPanel; from += 16 * kWide) {
      __m512i total[kRows][kWide], sum[kRows][kWide];
      if constexpr (K::kTwo) {
#pragma GCC unroll 6
        for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
          for (int j = 0; j < kWide; ++j) total[r][j] = _mm512_setzero_si512();
        }
      }
      start<K>(sums, p.sum_groups, sum);
      const uint8_t* subscale = stage.subscale[i * sums_each] + from;
      const int16_t* group_sums = sums;
      int64_t left = steps;  // of a group
      for (int64_t u = begin; u < end; u += kStepUnits) {
        const uint8_t* block = b.w + u / kUnits * code_block_bytes(K::kBits) + 4 * from;
        const uint32_t* row = x + u / kUnits * 8 * kRows;
        for (int64_t line = 0; line < ahead.count; ++line, ahead.from += 64) _mm_prefetch(ahead.from, _MM_HINT_T1);
        if (u % kUnits == 0) {
          add_step<K, 0>(block, row, sum);
        } else {
          add_step<K, kStepUnits>(block, row, sum);
        }
        if constexpr (K::kTwo) {
          if (--left) continue;
#pragma GCC unroll 4
          for (int j = 0; j < kWide; ++j) {
            const __m512i factor = widen(subscale + 16 * j, signed_scales);
#pragma GCC unroll 6
            for (int r = 0; r < kRows; ++r) {
              total[r][j] = _mm512_add_epi32(total[r][j], _mm512_mullo_epi32(sum[r][j], factor));
            }
          }
          if (u + kStepUnits == end) break;
          left = steps;
          subscale += kPanel;
          start<K>(++group_sums, p.sum_groups, sum);
        }
      }
#pragma GCC unroll 6
      for (int r = 0; r < kRows; ++r) {
        const int16_t* row_sums = sums + r * p.sum_groups;
        const __m512 scale = _mm512_set1_ps(row_scale[r * p.groups]);
#pragma GCC unroll 4
        for (int j = 0; j < kWide; ++j) {
          const int64_t n = from + 16 * j;
          const __m512i exact = K::kTwo ? total[r][j] : sum[r][j];
          __m512 value = _mm512_mul_ps(_mm512_maskz_cvtepi32_ps(0xffff, exact), _mm512_loadu_ps(s + n));
          if constexpr (!K::kSigned) {
            __m512i least = _mm512_set1_epi32(*row_sums);  // Σ_g subminimum · Σ x, or Σ x
            if constexpr (K::kTwo) {
              least = _mm512_setzero_si512();
              for (int64_t pair = 0; pair < sums_each / 2; ++pair) {
                int32_t two;
                std::memcpy(&two, row_sums + 2 * pair, sizeof two);
                const __m512i minima = _mm512_loadu_si512(stage.subminimum[i * sums_each / 2 + pair] + n);
                least = _mm512_add_epi32(least, _mm512_madd_epi16(minima, _mm512_set1_epi32(two)));
              }
            }
            value = _mm512_fnmadd_ps(_mm512_maskz_cvtepi32_ps(0xffff, least), _mm512_loadu_ps(m + n), value);
          }
          float* to = c + r * kPanel + n;
          _mm512_storeu_ps(to, _mm512_fmadd_ps(value, scale, first ? _mm512_setzero_ps() : _mm512_loadu_ps(to)));
        }
      }
    }
  }
}

using TileKernel = void (*)(const BlockProduct&, const PackedRows::Tile&, const Stage&, Lines);
template <int kBits, bool kTwo, bool kSigned, class K = Kind<kBits, kTwo, kSigned>>
constexpr TileKernel kTiles[] = {codes_tile_avx512<K, 1>, codes_tile_avx512<K, 2>, codes_tile_avx512<K, 3>,
                                 codes_tile_avx512<K, 4>, codes_tile_avx512<K, 5>, codes_tile_avx512<K, 6>};

const TileKernel* kernels_for(const Weights& w) {
  const bool two = w.subscales.data, zero_point = w.zero_point;
  if (!w.bits) return kTiles<8, false, true>;
  if (w.bits == 6) return kTiles<6, true, true>;
  if (w.bits == 5) return two ? kTiles<5, true, false> : zero_point ? kTiles<5, false, true> : kTiles<5, false, false>;
  return two ? kTiles<4, true, false> : zero_point ? kTiles<4, false, true> : kTiles<4, false, false>;
}

}  // namespace

void codes_block_avx512(const BlockProduct& b) {
  const Weights& w = *b.weights;
  Stage& stage = *static_cast<Stage*>(b.stage);
  stage_scales_avx512(b, stage);
  prefetch_scales(w, b.expert, b.output, b.column + b.columns, b.columns);
  const TileKernel* kernels = kernels_for(w);
  // The next block is prefetched evenly over the steps of all tiles.
  const int64_t first = b.rows->first_tile, tiles = b.rows->last_tile - first, bits = w.bits ? w.bits : 8;
  const int64_t bytes = b.columns * kPanel * bits / 8;
  const int64_t steps = b.columns / kStepColumns * (4 / wide(b.x->tiles[first].rows, w.bits, w.subscales.data));
  const int64_t lines = (bytes / 64 + steps * tiles - 1) / (steps * tiles);
  const uint8_t* next = b.next ? b.next : b.w + bytes;
  for (int64_t i = 0; i < tiles; ++i) {
    const PackedRows::Tile& t = b.x->tiles[first + i];
    const int64_t done = i * steps * lines * 64;
    kernels[t.rows - 1](b, t, stage, done < bytes ? Lines{next + done, lines} : Lines{next, 0});
  }
}

}  // namespace grok::cpu
#endif
