// int8 rows and weights: vpdpbusd adds the products of four columns to an int32 sum, exactly. Its first factor is
// unsigned, so the weights go in as w + 128, and each sum starts at −128 times the sum of the row.

#include "gemm_kernels.h"

#if GROK_X86
#include <immintrin.h>

namespace grok::cpu {
namespace {

constexpr int64_t kGroupRuns = kScaleGroup / 4;
static_assert(kRunsAhead % kGroupRuns == 0, "a group of columns has one scale");

// One group of up to 128 columns: c = or += scale · sum.
template <int kRows, int kLines>
GROK_AVX512_BF16 void int8_tile_avx512(const uint32_t* x, const uint8_t* w, int64_t runs, const float* scale,
                                       const int32_t* bias, int64_t groups, float* c, bool first, Ahead ahead) {
  const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
  while (runs > 0) {
    __m512i sum[kRows][4];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[r][j] = _mm512_set1_epi32(bias[r * groups]);
    }
    const int64_t count = runs < kGroupRuns ? runs : kGroupRuns;
    for (int64_t run = 0; run < count; ++run, w += kRunBytes, x += kRows, ahead.from += ahead.step) {
#pragma GCC unroll 4
      for (int line = 0; line < kLines; ++line) _mm_prefetch(ahead.from + 64 * line, _MM_HINT_T0);
      _mm_prefetch(x + kRowsAhead * kRows, _MM_HINT_T0);
      __m512i v[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) v[j] = _mm512_xor_si512(_mm512_loadu_si512(w + 64 * j), sign);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        const __m512i four = _mm512_set1_epi32(static_cast<int>(x[r]));
#pragma GCC unroll 4
        // written out: g++ 12 keeps such sums in memory where the intrinsic is used
        for (int j = 0; j < 4; ++j) asm("vpdpbusd %2, %1, %0" : "+v"(sum[r][j]) : "v"(v[j]), "v"(four));
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512 s = _mm512_set1_ps(scale[r * groups]);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        float* out = c + r * kPanel + j * 16;
        const __m512 value = _mm512_maskz_cvtepi32_ps(0xffff, sum[r][j]);  // the plain one warns in g++ 12
        _mm512_storeu_ps(out, first ? _mm512_mul_ps(value, s) : _mm512_fmadd_ps(value, s, _mm512_loadu_ps(out)));
      }
    }
    runs -= count;
    first = false;
    ++scale;
    ++bias;
  }
}

using TileKernel = void (*)(const uint32_t*, const uint8_t*, int64_t, const float*, const int32_t*, int64_t, float*,
                            bool, Ahead);
template <int kLines>
constexpr TileKernel kTiles[] = {int8_tile_avx512<1, kLines>, int8_tile_avx512<2, kLines>, int8_tile_avx512<3, kLines>,
                                 int8_tile_avx512<4, kLines>, int8_tile_avx512<5, kLines>, int8_tile_avx512<6, kLines>};

}  // namespace

void int8_block_avx512(const Block& b) {
  const int64_t groups = b.x->groups, runs = (b.columns + 3) / 4;
  for (int64_t i = b.rows->first_tile; i < b.rows->last_tile; ++i) {
    const PackedRows::Tile& t = b.x->tiles[i];
    const uint32_t* x = b.x->at(t, b.column / 4);
    const int64_t at = t.row * groups + b.column / kScaleGroup;
    float* c = b.c + (t.row - b.rows->row) * kPanel;
    if (!alone(b)) {
      kTiles<kShared>[t.rows - 1](x, b.w, runs, b.x->scales + at, b.x->bias + at, groups, c, b.first,
                                  share_of(b, i, runs));
      continue;
    }
    stream(b, runs, [&](int64_t run, int64_t count, bool first, Ahead ahead) {
      const int64_t from = at + run / kGroupRuns;
      kTiles<kAlone>[t.rows - 1](x + run * t.rows, b.w + run * kRunBytes, count, b.x->scales + from, b.x->bias + from,
                                 groups, c, first, ahead);
    });
  }
}

}  // namespace grok::cpu
#endif
