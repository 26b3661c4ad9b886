// Path::codes: int8 rows times codes of 4, 5 or 6 bits, by integers. vpmaddubsw adds two products in 16 bits; they stay
// there for as many columns as cannot overflow, and vpmaddwd multiplies by the group's subscale (or 1) on the way to
// 32 bits. fp32 begins once for each segment: the columns, 128 at most, that share the scales of weight and row.
//
//   c += row scale · (S · Σ_g subscale · (x · code) − M · Σ_g subminimum · (Σ x))        of two levels
//   c += row scale · (S · (x · code) − M · (Σ x))                                       of one
//
// Where codes have a zero point, zero_point · Σ x is subtracted in integers instead.

#include <cstring>
#include <type_traits>

#include "cpu/gemm/block_product.h"
#include "cpu/gemm/codes.h"
#include "cpu/gemm/group_scales.h"

#if GROK_X86
#include <immintrin.h>

namespace grok::cpu {
namespace {

#define GROK_AVX2_INLINE GROK_AVX2 __attribute__((always_inline)) inline

constexpr int64_t kAhead = 4096;  // bytes that the first tile of a row block prefetches ahead

// How codes are summed. kFold: units of 8 columns whose sums fit 16 bits, within one group. kTwo: of two levels.
// kSigned: a zero point, 2^(bits − 1), and no minima.
template <int kBits_, int kFold_, bool kTwo_, bool kSigned_>
struct Kind {
  static constexpr int kBits = kBits_, kFold = kFold_;
  static constexpr bool kTwo = kTwo_, kSigned = kSigned_;
};

// What the tiles of a row block share: the scales of each segment of a column block, for 64 outputs.
struct Segment {
  float s[kPanel], m[kPanel];
};

// The second level of a segment of 128 columns.
struct Groups {
  int32_t subscale[kScaleGroup / kLeastCodeGroup][kPanel];     // of each group, in both 16-bit halves
  int32_t subminimum[kScaleGroup / kLeastCodeGroup / 2][kPanel];  // of two groups, in the halves; or their subscales
};

constexpr int64_t kBlockColumns = kRunBlock * 4;
struct Stage {
  Segment segments[kBlockColumns / kLeastCodeGroup];
  Groups groups[kBlockColumns / kScaleGroup];
};
static_assert(sizeof(Stage) <= kStageBytes);

// 8 values of u8 or i8, each in both halves of its 32 bits.
template <class T>
GROK_AVX2_INLINE __m256i twice(const uint8_t* values, int64_t n) {
  int64_t eight;
  std::memcpy(&eight, values + n, sizeof eight);
  const __m256i bytes = _mm256_shuffle_epi8(
      _mm256_set1_epi64x(eight), _mm256_setr_epi32(0x00800080, 0x01800180, 0x02800280, 0x03800380, 0x04800480,
                                                   0x05800580, 0x06800680, 0x07800780));
  return std::is_signed_v<T> ? _mm256_srai_epi16(bytes, 8) : _mm256_srli_epi16(bytes, 8);
}

// T: the subscales' type. Without minima the zero point is multiplied by sums of these.
template <class T>
GROK_AVX2 void load_groups_avx2(const BlockProduct& b, int64_t first, int64_t count, Groups& groups) {
  const Weights& w = *b.weights;
  const auto store = [](int32_t* out, __m256i value) GROK_AVX2 {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), value);
  };
  uint8_t room[4][kPanel];
  for (int64_t g = 0; g < count; g += 2) {
    const auto bytes = [&](const Plane& plane, int64_t group, int at) {
      return group_bytes(w, plane, b.expert, b.output, group, room[at]);
    };
    const uint8_t *low = bytes(w.subscales, first + g, 0), *high = bytes(w.subscales, first + g + 1, 1);
    const uint8_t* low_minima = w.minima.data ? bytes(w.subminima, first + g, 2) : nullptr;
    const uint8_t* high_minima = w.minima.data ? bytes(w.subminima, first + g + 1, 3) : nullptr;
    for (int64_t n = 0; n < kPanel; n += 8) {
      __m256i even = twice<T>(low, n), odd = twice<T>(high, n);
      store(groups.subscale[g] + n, even);
      store(groups.subscale[g + 1] + n, odd);
      if (w.minima.data) {
        even = twice<uint8_t>(low_minima, n);
        odd = twice<uint8_t>(high_minima, n);
      }
      store(groups.subminimum[g / 2] + n, _mm256_blend_epi16(even, odd, 0xaa));
    }
  }
}

// Adds the products of one unit of 8 columns, in 16 bits. w: this register's outputs in the unit's block.
template <class K, int kRows, int kWide>
GROK_AVX2_INLINE void add_unit(const uint8_t* w, int unit, const uint32_t* x, int64_t ahead,
                               __m256i (&sum)[kRows][kWide]) {
  const __m256i nibble = _mm256_set1_epi8(15);
#pragma GCC unroll 8
  for (int j = 0; j < kWide; ++j) {
    const auto run = [&](int i) GROK_AVX2 {
      const uint8_t* from = w + i * kRunBytes + 32 * j;
      if (j % 2 == 0) _mm_prefetch(from + ahead, _MM_HINT_T0);
      return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from));
    };
    const __m256i low = run(unit);
    __m256i code[2] = {_mm256_and_si256(low, nibble), _mm256_and_si256(_mm256_srli_epi16(low, 4), nibble)};
    if constexpr (K::kBits > 4) {
      const __m256i high = run(high_run(K::kBits, unit)), mask = _mm256_set1_epi8(K::kBits == 5 ? 0x10 : 0x30);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const int up = 4 - high_shift(K::kBits, unit, half);
        const __m256i there = up > 0 ? _mm256_slli_epi16(high, up) : _mm256_srli_epi16(high, -up);
        code[half] = _mm256_or_si256(code[half], _mm256_and_si256(there, mask));
      }
    }
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m256i four = _mm256_set1_epi32(static_cast<int>(x[(2 * unit + half) * kRows + r]));
        sum[r][j] = _mm256_add_epi16(sum[r][j], _mm256_maddubs_epi16(code[half], four));
        asm("" : "+x"(sum[r][j]));  // else the compiler reorders the sums, and spills products to memory
      }
    }
  }
}

// Adds kFold units from kUnit0 on to the integer sums of the segment.
template <class K, int kUnit0, int kRows, int kWide>
GROK_AVX2_INLINE void add_fold(const uint8_t* w, const uint32_t* x, int64_t ahead, const int32_t* sub,
                               __m256i (&total)[kRows][kWide]) {
  __m256i sum[kRows][kWide];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
    for (int j = 0; j < kWide; ++j) sum[r][j] = _mm256_setzero_si256();
  }
#pragma GCC unroll 4
  for (int unit = kUnit0; unit < kUnit0 + K::kFold; ++unit) add_unit<K>(w, unit, x, ahead, sum);
#pragma GCC unroll 8
  for (int j = 0; j < kWide; ++j) {
    const __m256i factor =
        K::kTwo ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(sub + 8 * j)) : _mm256_set1_epi16(1);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      total[r][j] = _mm256_add_epi32(total[r][j], _mm256_madd_epi16(sum[r][j], factor));
    }
  }
}

// The segments of a column block, of one tile.
template <class K, int kRows>
GROK_AVX2 void codes_tile_avx2(const BlockProduct& b, const PackedRows::Tile& t, const Stage& stage, int64_t ahead) {
  constexpr int kWide = kRows == 1 ? (K::kFold == 4 ? 8 : 4) : kRows <= 3 ? 2 : 1;
  const Weights& w = *b.weights;
  const PackedRows& p = *b.x;
  const int64_t segment = segment_columns(w), pairs = kScaleGroup / w.group() / 2;
  const int group_shift = __builtin_ctzll(static_cast<uint64_t>(w.group() / kUnit));  // of two levels: a power of two
  const uint32_t* x = p.at(t, b.column / 4);
  const Segment* seg = stage.segments;
  const int16_t* sums = p.sums + t.row * p.sum_groups + b.column / p.sum_columns;
  float* c = b.c + (t.row - b.rows->row) * kPanel;
  bool first = b.first;
  for (int64_t k = 0; k < b.columns; k += segment, sums += segment / p.sum_columns, ++seg, first = false) {
    const Groups& groups = stage.groups[k / kScaleGroup];
    const int64_t begin = k / kUnit, end = std::min(k + segment, b.columns) / kUnit;
    const float* row_scale = p.scales + t.row * p.groups + (b.column + k) / kScaleGroup;
    for (int64_t from = 0; from < kPanel; from += 8 * kWide) {
      __m256i total[kRows][kWide];
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 8
        for (int j = 0; j < kWide; ++j) total[r][j] = _mm256_setzero_si256();
      }
      for (int64_t u = begin; u < end;) {
        const uint8_t* block = b.w + u / kUnits * code_block_bytes(K::kBits) + 4 * from;
        const uint32_t* row = x + u / kUnits * 8 * kRows;
        const auto sub = [&](int fold) { return groups.subscale[(u - begin + fold) >> group_shift] + from; };
        if constexpr (K::kFold == 4) {
          add_fold<K, 0>(block, row, ahead, sub(0), total);
          u += 4;
          continue;
        }
        if (u % kUnits == 0) {
          add_fold<K, 0>(block, row, ahead, sub(0), total);
          if constexpr (K::kFold == 1) add_fold<K, 1>(block, row, ahead, sub(1), total);
          u += 2;
          if (u == end) break;
        }
        add_fold<K, 2>(block, row, ahead, sub(0), total);
        if constexpr (K::kFold == 1) add_fold<K, 3>(block, row, ahead, sub(1), total);
        u += 2;
      }
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const int16_t* sum = sums + r * p.sum_groups;
        const __m256 scale = _mm256_set1_ps(row_scale[r * p.groups]);
#pragma GCC unroll 8
        for (int j = 0; j < kWide; ++j) {
          const int64_t n = from + 8 * j;
          __m256i least;  // Σ_g subminimum · Σ x, or Σ x
          if constexpr (K::kTwo) {
            least = _mm256_setzero_si256();
            for (int64_t pair = 0; pair < pairs; ++pair) {
              int32_t two;
              std::memcpy(&two, sum + 2 * pair, sizeof two);
              const __m256i minima = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(groups.subminimum[pair] + n));
              least = _mm256_add_epi32(least, _mm256_madd_epi16(minima, _mm256_set1_epi32(two)));
            }
          } else {
            least = _mm256_set1_epi32(*sum);
          }
          if constexpr (K::kSigned) {
            total[r][j] = _mm256_sub_epi32(total[r][j], _mm256_slli_epi32(least, K::kBits - 1));  // · the zero point
          }
          __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(total[r][j]), _mm256_loadu_ps(seg->s + n));
          if constexpr (!K::kSigned) {
            value = _mm256_fnmadd_ps(_mm256_cvtepi32_ps(least), _mm256_loadu_ps(seg->m + n), value);
          }
          float* to = c + r * kPanel + n;
          _mm256_storeu_ps(to, _mm256_fmadd_ps(value, scale, first ? _mm256_setzero_ps() : _mm256_loadu_ps(to)));
        }
      }
    }
  }
}

using TileKernel = void (*)(const BlockProduct&, const PackedRows::Tile&, const Stage&, int64_t);
template <int kBits, int kFold, bool kTwo, bool kSigned>
constexpr TileKernel kTiles[] = {
    codes_tile_avx2<Kind<kBits, kFold, kTwo, kSigned>, 1>, codes_tile_avx2<Kind<kBits, kFold, kTwo, kSigned>, 2>,
    codes_tile_avx2<Kind<kBits, kFold, kTwo, kSigned>, 3>, codes_tile_avx2<Kind<kBits, kFold, kTwo, kSigned>, 4>,
    codes_tile_avx2<Kind<kBits, kFold, kTwo, kSigned>, 5>, codes_tile_avx2<Kind<kBits, kFold, kTwo, kSigned>, 6>};

// 32 columns of products of 4 bits fit 16 bits, 16 of 5 bits and 8 of 6 bits: 8 · 2 · 15 · 128 and so on.
const TileKernel* kernels_for(const Weights& w) {
  const bool two = w.subscales.data, zero_point = w.zero_point;
  if (w.bits == 6) return kTiles<6, 1, true, true>;
  if (w.bits == 5) {
    return two ? kTiles<5, 2, true, false> : zero_point ? kTiles<5, 2, false, true> : kTiles<5, 2, false, false>;
  }
  if (w.group() % kCodeColumns) {
    return two ? kTiles<4, 2, true, false> : zero_point ? kTiles<4, 2, false, true> : kTiles<4, 2, false, false>;
  }
  return two ? kTiles<4, 4, true, false> : zero_point ? kTiles<4, 4, false, true> : kTiles<4, 4, false, false>;
}

}  // namespace

void codes_block_avx2(const BlockProduct& b) {
  const Weights& w = *b.weights;
  Stage& stage = *static_cast<Stage*>(b.stage);
  const int64_t segment = segment_columns(w), group = w.group(), super = w.k / w.scales.groups;
  const auto load = w.subscales.type == ScaleType::i8 ? load_groups_avx2<int8_t> : load_groups_avx2<uint8_t>;
  int64_t segments = 0;
  // counted on: a division takes as long as the scales of a few outputs
  int64_t g = b.column / group, first = b.column / super;  // the group, and that of the first level
  for (int64_t k = 0; k < b.columns; k += segment) {
    Segment& to = stage.segments[segments++];
    if (b.column + k == (first + 1) * super) ++first;
    if (!w.subscales.data) {
      if (b.column + k == (g + 1) * group) ++g;
      group_scales(w, b.expert, b.output, g, b.x->isa, to.s, to.m);
      continue;
    }
    plane_values(w, w.scales, b.expert, b.output, first, b.x->isa, to.s);
    if (w.minima.data) plane_values(w, w.minima, b.expert, b.output, first, b.x->isa, to.m);
    const int64_t count = kScaleGroup / group;
    load(b, g, count, stage.groups[k / kScaleGroup]);
    g += count;
  }
  prefetch_scales(w, b.expert, b.output, b.column + b.columns, b.columns);
  const TileKernel* kernels = kernels_for(w);
  for (int64_t i = b.rows->first_tile; i < b.rows->last_tile; ++i) {
    const PackedRows::Tile& t = b.x->tiles[i];
    kernels[t.rows - 1](b, t, stage, i == b.rows->first_tile ? kAhead : 0);
  }
}

}  // namespace grok::cpu
#endif
