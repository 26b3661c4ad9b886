// Path::bf16: vdpbf16ps adds the products of two columns to an fp32 sum. Weights of 8 bits are converted to bf16
// exactly, in registers for a lone tile, else into a stage that the tiles of a row block share.

#include "cpu/avx512.h"
#include "cpu/bf16_bytes.h"
#include "cpu/gemm/prefetch.h"

#if GROK_X86

namespace grok::cpu {
namespace {

// A shuffle of 16 bytes, 4 outputs × 4 columns: the first two columns of all four outputs, then the other two.
struct PairOrder {
  alignas(64) uint8_t byte[64];

  constexpr PairOrder() : byte() {
    for (int i = 0; i < 64; ++i) byte[i] = static_cast<uint8_t>(i % 8 / 2 * 4 + i % 2 + i % 16 / 8 * 2);
  }
};
constexpr PairOrder kPairOrder;

#define GROK_TARGET_INLINE GROK_AVX512_BF16 __attribute__((always_inline)) inline

// Of a run of 4 columns: columns 0 and 1, and columns 2 and 3, as bf16 pairs of 16 outputs.
struct Pairs {
  __m512i first, second;
};

template <DType kType>
struct Converter {
  __m512i low0, low1, high0, high1, order, sign;

  GROK_TARGET_INLINE Converter() {
    const Bf16Bytes& t = kType == DType::int8 ? kInt8Bytes : kE4m3Bytes;
    low0 = _mm512_load_si512(t.low);
    low1 = _mm512_load_si512(t.low + 64);
    high0 = _mm512_load_si512(t.high);
    high1 = _mm512_load_si512(t.high + 64);
    order = _mm512_load_si512(kPairOrder.byte);
    sign = _mm512_set1_epi8(static_cast<char>(0x80));
  }

  // Whether a run holds −128, whose magnitude does not fit the seven bits that index the tables. It is rare: one test
  // a run is cheaper than correcting each register.
  GROK_TARGET_INLINE bool has_lowest(const uint8_t* run) const {
    if (kType != DType::int8) return false;
    __m512i least = _mm512_loadu_si512(run);
#pragma GCC unroll 4
    for (int j = 1; j < 4; ++j) least = _mm512_min_epi8(least, _mm512_loadu_si512(run + 64 * j));
    return _mm512_cmpeq_epi8_mask(least, sign) != 0;
  }

  // Converts 16 outputs × 4 columns. `lowest`: what has_lowest said of their run.
  GROK_TARGET_INLINE Pairs operator()(const uint8_t* w, bool lowest) const {
    return lowest ? converted<true>(w) : converted<false>(w);
  }

 private:
  template <bool kLowest>
  GROK_TARGET_INLINE Pairs converted(const uint8_t* w) const {
    __m512i code = _mm512_shuffle_epi8(_mm512_loadu_si512(w), order);
    keep(code);  // vpermi2b overwrites its index, so the compiler would compute it twice
    const __m512i index = kType == DType::int8 ? _mm512_abs_epi8(code) : code;
    const __m512i low = _mm512_permutex2var_epi8(low0, index, low1);
    __m512i high = _mm512_permutex2var_epi8(high0, index, high1);
    high = _mm512_ternarylogic_epi32(high, code, sign, 0xf8);  // high | (code & sign)
    if (kLowest) {  // −128 is 0xc300 in bf16
      high = _mm512_mask_mov_epi8(high, _mm512_cmpeq_epi8_mask(code, sign), _mm512_set1_epi8(static_cast<char>(0xc3)));
    }
    return {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
  }
};

GROK_TARGET_INLINE __m512bh broadcast(const uint32_t* pair) {
  return (__m512bh)_mm512_set1_epi32(static_cast<int>(*pair));
}

template <int kRows, int kWide>
GROK_TARGET_INLINE void load_sums(__m512 (&sum)[kRows][kWide], const float* c, bool first) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) sum[r][j] = first ? _mm512_setzero_ps() : _mm512_loadu_ps(c + r * kPanel + j * 16);
  }
}

template <int kRows, int kWide>
GROK_TARGET_INLINE void store_sums(const __m512 (&sum)[kRows][kWide], float* c) {
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r) {
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) _mm512_storeu_ps(c + r * kPanel + j * 16, sum[r][j]);
  }
}

// c (+)= x · w of one tile, from weights in bf16: a run is 2 columns.
template <int kRows, Fetch kFetch>
GROK_AVX512_BF16 void bf16_tile_avx512(const uint32_t* x, const uint8_t* w, int64_t runs, float* c, bool first,
                                       Ahead ahead) {
  __m512 sum[kRows][4];
  load_sums(sum, c, first);
  for (int64_t run = 0; run < runs; ++run, w += kRunBytes, x += kRows, ahead.from += ahead.step) {
    fetch<kFetch>(ahead.from);
    _mm_prefetch(x + kRowsAhead * kRows, _MM_HINT_T0);
    __m512bh v[4];
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) v[j] = (__m512bh)_mm512_loadu_si512(w + 64 * j);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512bh pair = broadcast(x + r);
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) sum[r][j] = _mm512_dpbf16_ps(sum[r][j], v[j], pair);
    }
  }
  store_sums(sum, c);
}

// c (+)= x · w of one tile and 16 · kWide outputs, from weights of 8 bits: a run is 4 columns.
template <int kRows, DType kType, int kWide>
GROK_AVX512_BF16 void bf16_direct_avx512(const uint32_t* x, const uint8_t* w, int64_t runs, float* c, bool first,
                                         Ahead ahead) {
  __m512 sum[kRows][kWide];
  load_sums(sum, c, first);
  const Converter<kType> convert;
  for (int64_t run = 0; run < runs; ++run, w += kRunBytes, x += 2 * kRows, ahead.from += ahead.step) {
    const bool lowest = convert.has_lowest(w);
#pragma GCC unroll 4
    for (int j = 0; j < kWide; ++j) {
      _mm_prefetch(ahead.from + 64 * j, _MM_HINT_T1);
      const Pairs v = convert(w + 64 * j, lowest);
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) {
        add_pairs(sum[r][j], v.first, x + r);
        add_pairs(sum[r][j], v.second, x + kRows + r);
      }
    }
  }
  store_sums(sum, c);
}

// Converts runs of 4 columns of 8 bits to twice as many runs of bf16 pairs.
template <DType kType>
GROK_AVX512_BF16 void bf16_stage_avx512(const uint8_t* w, int64_t runs, uint8_t* stage, Ahead ahead) {
  const Converter<kType> convert;
  for (int64_t run = 0; run < runs; ++run, w += kRunBytes, stage += 2 * kRunBytes, ahead.from += ahead.step) {
    const bool lowest = convert.has_lowest(w);
    fetch<Fetch::many>(ahead.from);
#pragma GCC unroll 4
    for (int j = 0; j < 4; ++j) {
      const Pairs v = convert(w + 64 * j, lowest);
      _mm512_store_si512(stage + 64 * j, v.first);
      _mm512_store_si512(stage + kRunBytes + 64 * j, v.second);
    }
  }
}

using TileKernel = void (*)(const uint32_t*, const uint8_t*, int64_t, float*, bool, Ahead);

template <Fetch kFetch>
constexpr TileKernel kTiles[] = {bf16_tile_avx512<1, kFetch>, bf16_tile_avx512<2, kFetch>, bf16_tile_avx512<3, kFetch>,
                                 bf16_tile_avx512<4, kFetch>, bf16_tile_avx512<5, kFetch>, bf16_tile_avx512<6, kFetch>};
template <DType kType>
constexpr TileKernel kDirect[] = {bf16_direct_avx512<1, kType, 4>, bf16_direct_avx512<2, kType, 4>,
                                  bf16_direct_avx512<3, kType, 4>, bf16_direct_avx512<4, kType, 4>,
                                  bf16_direct_avx512<5, kType, 4>, bf16_direct_avx512<6, kType, 4>};

}  // namespace

void bf16_block_avx512(const BlockProduct& b) {
  const PackedRows::Tile* tiles = b.x->tiles.data() + b.rows->first_tile;
  const int64_t quads = (b.columns + 3) / 4, rows = b.rows->rows;
  const uint32_t* x = b.x->at(*tiles, b.column / 2);
  if (b.type != DType::bf16 && alone(b)) {
    const TileKernel kernel = (b.type == DType::int8 ? kDirect<DType::int8> : kDirect<DType::e4m3>)[rows - 1];
    stream(b, quads, [&](int64_t run, int64_t count, bool first, Ahead ahead) {
      kernel(x + 2 * run * rows, b.w + run * kRunBytes, count, b.c, first, ahead);
    });
    return;
  }
  if (b.type == DType::bf16 && alone(b)) {
    stream(b, 2 * quads, [&](int64_t run, int64_t count, bool first, Ahead ahead) {
      kTiles<Fetch::alone>[rows - 1](x + run * rows, b.w + run * kRunBytes, count, b.c, first, ahead);
    });
    return;
  }
  const int64_t count = b.rows->last_tile - b.rows->first_tile, runs = 2 * quads;
  const bool converts = b.type != DType::bf16;
  const int64_t before = converts ? quads : 0, all = before + count * runs;
  const uint8_t* w = b.w;
  if (converts) {
    uint8_t* stage = static_cast<uint8_t*>(b.stage);
    const auto convert = b.type == DType::int8 ? bf16_stage_avx512<DType::int8> : bf16_stage_avx512<DType::e4m3>;
    convert(w, quads, stage, share_of(b, 0, all));
    w = stage;
  }
  for (int64_t i = 0; i < count; ++i, ++tiles) {
    kTiles<Fetch::many>[tiles->rows - 1](b.x->at(*tiles, b.column / 2), w, runs,
                                         b.c + (tiles->row - b.rows->row) * kPanel, b.first,
                                         share_of(b, before + i * runs, all));
  }
}

}  // namespace grok::cpu
#endif
