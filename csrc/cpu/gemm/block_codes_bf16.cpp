// Path::bf16_codes: codes of 4, 5 or 6 bits times bf16 rows by vdpbf16ps. A code u becomes the bf16 number
// 2^bits + u, exactly: its bits at the top of the mantissa, under a constant exponent. With S and M of a group,
//
//   Σ x · (S · u − M)  =  S · Σ x · (2^bits + u)  −  (M + 2^bits · S) · Σ x
//
// The sums over x · (2^bits + u) end at each group and at each multiple of 128 columns, where they are scaled and added
// to the total, so that the order of additions depends on the format alone.

#include "cpu/avx512.h"
#include "cpu/gemm/codes.h"
#include "cpu/gemm/group_scales.h"
#include "cpu/gemm/prefetch.h"

#if GROK_X86

namespace grok::cpu {
namespace {

#define GROK_TARGET_INLINE GROK_AVX512_BF16 __attribute__((always_inline)) inline

constexpr int64_t kLongest = 128;    // columns of a sum
constexpr int64_t kStep = kSumUnit;  // columns that a step multiplies: half a block
constexpr int64_t kAheadBytes = 8 << 10;
constexpr int kVectors = kPanel / 16;

// Pair `pair` (0 to 3) of unit `unit` as bf16 numbers 2^bits + u of 16 outputs.
template <int bits, int unit, int pair>
GROK_TARGET_INLINE __m512i pairs(__m512i low, __m512i high) {
  constexpr int kAt = 7 - bits;  // of the code in the mantissa
  constexpr uint32_t kLow = 0x000f000fu << kAt, kExponent = 0x00010001u * ((127 + bits) << 7);
  const __m512i mask = _mm512_set1_epi32(static_cast<int>(kLow));
  const __m512i exponent = _mm512_set1_epi32(static_cast<int>(kExponent));
  // 0xea: (first & second) | third
  const __m512i v = _mm512_ternarylogic_epi32(shift_right<4 * pair - kAt>(low), mask, exponent, 0xea);
  if constexpr (bits == 4) {
    return v;
  } else {
    constexpr uint32_t kHigh = (bits == 5 ? 0x00010001u : 0x00030003u) << (kAt + 4);
    constexpr int kFrom = 8 * (pair / 2) + high_shift(bits, unit, pair % 2);
    const __m512i top = _mm512_set1_epi32(static_cast<int>(kHigh));
    return _mm512_ternarylogic_epi32(shift_right<kFrom - kAt - 4>(high), top, v, 0xea);
  }
}

// A unit of 8 columns; take(pair, j, v): pair `pair` of it, of outputs 16j … 16j + 15.
template <int bits, int unit, class Take>
GROK_TARGET_INLINE void unpack_unit(const uint8_t* block, Take take) {
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    const __m512i low = _mm512_loadu_si512(block + unit * kRunBytes + 64 * j);
    __m512i high = low;
    if constexpr (bits > 4) high = _mm512_loadu_si512(block + high_run(bits, unit) * kRunBytes + 64 * j);
    take(0, j, pairs<bits, unit, 0>(low, high));
    take(1, j, pairs<bits, unit, 1>(low, high));
    take(2, j, pairs<bits, unit, 2>(low, high));
    take(3, j, pairs<bits, unit, 3>(low, high));
  }
}

// Columns of the sum that begins at this column of the weight.
GROK_INLINE int64_t sum_columns(int64_t column, int64_t end, int64_t group) {
  return std::min({end, (column / group + 1) * group, (column / kLongest + 1) * kLongest}) - column;
}

struct Scales {
  alignas(64) float s[kPanel], m[kPanel];  // m: M + 2^bits · S
};

GROK_TARGET_INLINE void load_scales(const BlockProduct& b, int64_t column, Scales& scales) {
  group_scales(*b.weights, b.expert, b.output, column / b.weights->group(), b.x->isa, scales.s, scales.m);
  const __m512 offset = _mm512_set1_ps(static_cast<float>(1 << b.bits));
#pragma GCC unroll 4
  for (int j = 0; j < kVectors; ++j) {
    const __m512 m = _mm512_fmadd_ps(offset, _mm512_load_ps(scales.s + 16 * j), _mm512_load_ps(scales.m + 16 * j));
    _mm512_store_ps(scales.m + 16 * j, m);
  }
}

// Σ x of columns column … column + columns − 1 of a row.
GROK_INLINE float row_sum(const BlockProduct& b, int64_t row, int64_t column, int64_t columns) {
  const float* sums = b.x->unit_sums + row * (b.x->k / kSumUnit) + column / kSumUnit;
  float total = sums[0];
  for (int64_t i = 1; i < columns / kSumUnit; ++i) total += sums[i];
  return total;
}

// c += S · sum − m · Σ x, and sum = 0.
template <int rows>
GROK_TARGET_INLINE void add_scaled(const BlockProduct& b, const PackedRows::Tile& t, int64_t column, int64_t columns,
                                   const Scales& scales, __m512 (&sum)[rows][kVectors], float* c) {
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
    const __m512 x = _mm512_set1_ps(row_sum(b, t.row + r, column, columns));
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) {
      float* to = c + r * kPanel + 16 * j;
      const __m512 total = _mm512_fmadd_ps(_mm512_load_ps(scales.s + 16 * j), sum[r][j], _mm512_loadu_ps(to));
      _mm512_storeu_ps(to, _mm512_fnmadd_ps(_mm512_load_ps(scales.m + 16 * j), x, total));
      sum[r][j] = _mm512_setzero_ps();
    }
  }
}

template <int rows>
GROK_TARGET_INLINE void clear(__m512 (&sum)[rows][kVectors]) {
#pragma GCC unroll 6
  for (int r = 0; r < rows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kVectors; ++j) sum[r][j] = _mm512_setzero_ps();
  }
}

// A lone tile, whose weights are unpacked in registers.
template <int rows, int bits>
GROK_AVX512_BF16 void lone_tile_avx512(const BlockProduct& b) {
  const PackedRows::Tile& t = b.x->tiles[b.rows->first_tile];
  const uint32_t* x = b.x->at(t, b.column / 2);
  const int64_t group = b.weights->group(), end = b.column + b.columns;
  const int64_t bytes = b.columns / kCodeColumns * bits * kRunBytes;
  __m512 sum[rows][kVectors];
  clear(sum);
  Scales scales;
  for (int64_t column = b.column, columns; column < end; column += columns) {
    columns = sum_columns(column, end, group);
    load_scales(b, column, scales);
    for (int64_t k = column; k < column + columns; k += kStep, x += kStep / 2 * rows) {
      const int64_t at = (k - b.column) / kCodeColumns * bits * kRunBytes;
      const int64_t ahead = at + kAheadBytes;
      const uint8_t* block = b.w + at;
      const uint8_t* later = ahead < bytes || !b.next ? b.w + ahead : b.next + (ahead - bytes);
      const auto multiply = [&](int first) GROK_AVX512_BF16 {
        return [&, first](int pair, int j, __m512i v) GROK_AVX512_BF16 {
#pragma GCC unroll 6
          for (int r = 0; r < rows; ++r) add_pairs(sum[r][j], v, x + (first + pair) * rows + r);
        };
      };
      if (k % kCodeColumns == 0) {
        for (int64_t i = 0; i < bits * kRunBytes; i += 64) _mm_prefetch(later + i, _MM_HINT_T1);
        unpack_unit<bits, 0>(block, multiply(0));
        unpack_unit<bits, 1>(block, multiply(4));
      } else {
        unpack_unit<bits, 2>(block, multiply(0));
        unpack_unit<bits, 3>(block, multiply(4));
      }
    }
    add_scaled(b, t, column, columns, scales, sum, b.c);
  }
}

// Unpacks a column block into runs of bf16 pairs.
template <int bits>
GROK_AVX512_BF16 void stage_avx512(const BlockProduct& b, uint8_t* stage) {
  const auto store = [&](int first) GROK_AVX512_BF16 {
    return [stage, first](int pair, int j, __m512i v) GROK_AVX512_BF16 {
      _mm512_store_si512(stage + (first + pair) * kRunBytes + 64 * j, v);
    };
  };
  const uint8_t* block = b.w;
  for (int64_t k = 0; k < b.columns; k += kCodeColumns, block += bits * kRunBytes, stage += 16 * kRunBytes) {
    unpack_unit<bits, 0>(block, store(0));
    unpack_unit<bits, 1>(block, store(4));
    unpack_unit<bits, 2>(block, store(8));
    unpack_unit<bits, 3>(block, store(12));
  }
}

// A tile times the stage. `scales`: of each sum, in their order.
template <int rows>
GROK_AVX512_BF16 void staged_tile_avx512(const BlockProduct& b, const PackedRows::Tile& t, const uint8_t* stage,
                                         const Scales* scales, Ahead ahead) {
  const uint32_t* x = b.x->at(t, b.column / 2);
  float* c = b.c + (t.row - b.rows->row) * kPanel;
  const int64_t group = b.weights->group(), end = b.column + b.columns;
  __m512 sum[rows][kVectors];
  clear(sum);
  for (int64_t column = b.column, columns; column < end; column += columns, ++scales) {
    columns = sum_columns(column, end, group);
    for (int64_t k = 0; k < columns; k += 2, x += rows, stage += kRunBytes, ahead.from += ahead.step) {
      fetch<Fetch::many>(ahead.from);
#pragma GCC unroll 4
      for (int j = 0; j < kVectors; ++j) {
        const __m512i v = _mm512_load_si512(stage + 64 * j);
#pragma GCC unroll 6
        for (int r = 0; r < rows; ++r) add_pairs(sum[r][j], v, x + r);
      }
    }
    add_scaled(b, t, column, columns, *scales, sum, c);
  }
}

using LoneTile = void (*)(const BlockProduct&);
template <int bits>
constexpr LoneTile kLone[] = {lone_tile_avx512<1, bits>, lone_tile_avx512<2, bits>, lone_tile_avx512<3, bits>,
                              lone_tile_avx512<4, bits>, lone_tile_avx512<5, bits>, lone_tile_avx512<6, bits>};
constexpr decltype(&staged_tile_avx512<1>) kStaged[] = {staged_tile_avx512<1>, staged_tile_avx512<2>,
                                                        staged_tile_avx512<3>, staged_tile_avx512<4>,
                                                        staged_tile_avx512<5>, staged_tile_avx512<6>};

}  // namespace

GROK_AVX512_BF16 void bf16_codes_block_avx512(const BlockProduct& b) {
  if (b.first) std::fill(b.c, b.c + b.rows->rows * kPanel, 0.0f);
  if (alone(b)) {
    const auto kernels = b.bits == 4 ? kLone<4> : b.bits == 5 ? kLone<5> : kLone<6>;
    return kernels[b.rows->rows - 1](b);
  }
  uint8_t* stage = static_cast<uint8_t*>(b.stage);
  (b.bits == 4 ? stage_avx512<4> : b.bits == 5 ? stage_avx512<5> : stage_avx512<6>)(b, stage);
  constexpr int64_t kColumnsOfBlock = 2 * kRunBlock;
  static_assert(kColumnsOfBlock * kPanel * 2 <= kStageBytes);
  Scales scales[kColumnsOfBlock / kLeastCodeGroup];
  const int64_t group = b.weights->group(), end = b.column + b.columns;
  int64_t sums = 0;
  for (int64_t column = b.column; column < end; column += sum_columns(column, end, group)) {
    load_scales(b, column, scales[sums++]);
  }
  const int64_t count = b.rows->last_tile - b.rows->first_tile, runs = b.columns / 2;
  for (int64_t i = 0; i < count; ++i) {
    const PackedRows::Tile& t = b.x->tiles[b.rows->first_tile + i];
    kStaged[t.rows - 1](b, t, stage, scales, share_of(b, i * runs, count * runs));
  }
}

}  // namespace grok::cpu
#endif
