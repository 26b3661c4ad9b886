// Path::int8: vpdpbusd adds the products of four columns to an int32 sum, exactly. Its first operand is unsigned, so
// the weights are taken as w + 128, and each sum starts at −128 · the sum of the row (PackedRows::bias).

#include "cpu/avx512.h"
#include "cpu/gemm/prefetch.h"

#if GROK_X86

namespace grok::cpu {
namespace {

constexpr int64_t kGroupRuns = kScaleGroup / 4;
constexpr int64_t kFewTiles = 3;  // so many tiles compute faster than memory delivers their weights
static_assert(kRunsAhead % kGroupRuns == 0, "stream() must not cut a group of columns that has one scale");

// c (+)= Σ over groups of 128 columns of scale · (x · w of the group), of one tile and 16 · kWide outputs. Registers
// hold the integer sums of a group; they hold the fp32 totals too for 6 rows and 32 outputs, or 3 rows and 64. For a
// larger tile the totals stay in c.
template <int kRows, int kWide, Fetch kFetch>
GROK_AVX512_VNNI void int8_tile_avx512(const uint32_t* x, const uint8_t* w, int64_t runs, const float* scale,
                                       const int32_t* bias, int64_t groups, float* c, bool first, Ahead ahead) {
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
  constexpr bool kInRegisters = kRows * kWide <= 12;
  __m512 total[kInRegisters ? kRows : 1][kInRegisters ? kWide : 1];
  const auto total_so_far = [&](int r, int j) GROK_AVX512_VNNI {
    return first ? _mm512_setzero_ps() : _mm512_loadu_ps(c + r * kPanel + j * 16);
  };
  if constexpr (kInRegisters) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < kWide; ++j) total[r][j] = total_so_far(r, j);
    }
  }
  while (runs > 0) {
    __m512i sum[kRows][kWide];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < kWide; ++j) sum[r][j] = _mm512_set1_epi32(bias[r * groups]);
    }
    const int64_t count = runs < kGroupRuns ? runs : kGroupRuns;
    for (int64_t run = 0; run < count; ++run, w += kRunBytes, x += kRows, ahead.from += ahead.step) {
      fetch<kFetch>(ahead.from);
      _mm_prefetch(x + kRowsAhead * kRows, _MM_HINT_T0);
      __m512i v[kWide];
#pragma GCC unroll 4
      for (int j = 0; j < kWide; ++j) v[j] = _mm512_xor_si512(_mm512_loadu_si512(w + 64 * j), sign);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m512i four = _mm512_set1_epi32(static_cast<int>(x[r]));
#pragma GCC unroll 4
        for (int j = 0; j < kWide; ++j) add_quads(sum[r][j], v[j], four);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512 s = _mm512_set1_ps(scale[r * groups]);
#pragma GCC unroll 4
      for (int j = 0; j < kWide; ++j) {
        const __m512 value = _mm512_maskz_cvtepi32_ps(0xffff, sum[r][j]);  // without the mask g++ 12 warns
        if constexpr (kInRegisters) {
          total[r][j] = _mm512_fmadd_ps(value, s, total[r][j]);
        } else {
          _mm512_storeu_ps(c + r * kPanel + j * 16, _mm512_fmadd_ps(value, s, total_so_far(r, j)));
        }
      }
    }
    runs -= count;
    if (!kInRegisters) first = false;
    ++scale;
    ++bias;
  }
  if constexpr (kInRegisters) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < kWide; ++j) _mm512_storeu_ps(c + r * kPanel + j * 16, total[r][j]);
    }
  }
}

using TileKernel = void (*)(const uint32_t*, const uint8_t*, int64_t, const float*, const int32_t*, int64_t, float*,
                            bool, Ahead);
template <int kWide, Fetch kFetch>
constexpr TileKernel kTiles[] = {int8_tile_avx512<1, kWide, kFetch>, int8_tile_avx512<2, kWide, kFetch>,
                                 int8_tile_avx512<3, kWide, kFetch>, int8_tile_avx512<4, kWide, kFetch>,
                                 int8_tile_avx512<5, kWide, kFetch>, int8_tile_avx512<6, kWide, kFetch>};

}  // namespace

void int8_block_avx512(const BlockProduct& b) {
  const int64_t groups = b.x->groups, runs = (b.columns + 3) / 4;
  const int64_t tiles = b.rows->last_tile - b.rows->first_tile;
  if (alone(b)) {
    const PackedRows::Tile& t = b.x->tiles[b.rows->first_tile];
    const uint32_t* x = b.x->at(t, b.column / 4);
    const int64_t at = t.row * groups + b.column / kScaleGroup;
    stream(b, runs, [&](int64_t run, int64_t count, bool first, Ahead ahead) {
      const int64_t from = at + run / kGroupRuns;
      kTiles<4, Fetch::alone>[t.rows - 1](x + run * t.rows, b.w + run * kRunBytes, count, b.x->scales + from,
                                          b.x->bias + from, groups, b.c, first, ahead);
    });
    return;
  }
  const auto kernels = tiles <= kFewTiles ? kTiles<2, Fetch::few> : kTiles<2, Fetch::many>;
  for (int64_t half = 0; half < 2; ++half) {
    for (int64_t i = 0; i < tiles; ++i) {
      const PackedRows::Tile& t = b.x->tiles[b.rows->first_tile + i];
      const int64_t at = t.row * groups + b.column / kScaleGroup;
      kernels[t.rows - 1](b.x->at(t, b.column / 4), b.w + half * kRunBytes / 2, runs, b.x->scales + at, b.x->bias + at,
                          groups, b.c + (t.row - b.rows->row) * kPanel + half * kPanel / 2, b.first,
                          share_of(b, (half * tiles + i) * runs, 2 * tiles * runs));
    }
  }
}

}  // namespace grok::cpu
#endif
