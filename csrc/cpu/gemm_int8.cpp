// int8 rows and weights: vpdpbusd adds the products of four columns to an int32 sum, exactly. Its first factor is
// unsigned, so the weights go in as w + 128, and each sum starts at −128 times the sum of the row.

#include "gemm_kernels.h"

#if GROK_X86
#include <immintrin.h>

namespace grok::cpu {
namespace {

constexpr int64_t kGroupRuns = kScaleGroup / 4;
constexpr int64_t kFewTiles = 3;  // compute faster than memory gives them weights
static_assert(kRunsAhead % kGroupRuns == 0, "a group of columns has one scale");

// With 16 · kWide outputs: c = or += Σ scale · sum, over groups of up to 128 columns. The registers hold the sums of a group
// and those of all together for 6 rows and 32 outputs, or 3 and 64; of a larger tile the latter are in c.
template <int kRows, int kWide, Fetch kFetch>
GROK_AVX512_BF16 void int8_tile_avx512(const uint32_t* x, const uint8_t* w, int64_t runs, const float* scale,
                                       const int32_t* bias, int64_t groups, float* c, bool first, Ahead ahead) {
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
  constexpr bool kHeld = kRows * kWide <= 12;
  __m512 total[kHeld ? kRows : 1][kHeld ? kWide : 1];
  const auto so_far = [&](int r, int j) GROK_AVX512_BF16 {
    return first ? _mm512_setzero_ps() : _mm512_loadu_ps(c + r * kPanel + j * 16);
  };
  if constexpr (kHeld) {
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < kWide; ++j) total[r][j] = so_far(r, j);
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
        // written out: g++ 12 keeps such sums in memory where the intrinsic is used
        for (int j = 0; j < kWide; ++j) asm("vpdpbusd %2, %1, %0" : "+v"(sum[r][j]) : "v"(v[j]), "v"(four));
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512 s = _mm512_set1_ps(scale[r * groups]);
#pragma GCC unroll 4
      for (int j = 0; j < kWide; ++j) {
        const __m512 value = _mm512_maskz_cvtepi32_ps(0xffff, sum[r][j]);  // the plain one warns in g++ 12
        if constexpr (kHeld) {
          total[r][j] = _mm512_fmadd_ps(value, s, total[r][j]);
        } else {
          _mm512_storeu_ps(c + r * kPanel + j * 16, _mm512_fmadd_ps(value, s, so_far(r, j)));
        }
      }
    }
    runs -= count;
    if (!kHeld) first = false;
    ++scale;
    ++bias;
  }
  if constexpr (kHeld) {
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

void int8_block_avx512(const Block& b) {
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
