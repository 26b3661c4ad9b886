#include "cpu/gemm/packed_rows.h"

#include <cstring>

#include "cpu/avx512.h"
#include "cpu/fp8.h"
#include "cpu/gemm/codes.h"

namespace grok::cpu {
namespace {

float element(const void* row, DType type, int64_t i) {
  switch (type) {
    case DType::f32: return static_cast<const float*>(row)[i];
    case DType::bf16: return to_float(static_cast<const BF16*>(row)[i]);
    case DType::int8: return static_cast<const int8_t*>(row)[i];
    default: return from_e4m3(static_cast<const uint8_t*>(row)[i]);
  }
}

// Values packed in a range of a parallel_for, at least.
constexpr int64_t kValuesPerRange = 1 << 16;

// Writes columns from..from+count−1 of a row of k as fp32, `tile` dwords apart; zeros past k.
void spread_f32(const void* row, DType type, const float* scale, int64_t groups, int64_t from, int64_t count, int64_t k,
                int64_t tile, uint32_t* out) {
  for (int64_t i = from; i < from + count; ++i, out += tile) {
    float value = 0.0f;
    if (i < k) value = element(row, type, i) * (scale ? scale[groups == 1 ? 0 : i / kScaleGroup] : 1.0f);
    std::memcpy(out, &value, 4);
  }
}

#if GROK_X86
// How the dwords of `rows` rows are interleaved, 16 runs at a time: dword i of the result is run i / rows of row i %
// rows.
struct Interleaving {
  alignas(64) int32_t run[kTile][16];  // of each dword of a register of the result
  uint16_t row[kTile][kTile];          // [register][row]: mask of the dwords that come from this row
};

struct Interleavings {
  Interleaving of[kTile];
};

constexpr Interleavings make_interleavings() {
  Interleavings all{};
  for (int rows = 1; rows <= kTile; ++rows) {
    Interleaving& x = all.of[rows - 1];
    for (int i = 0; i < 16 * rows; ++i) {
      x.run[i / 16][i % 16] = i / rows;
      x.row[i / 16][i % rows] = static_cast<uint16_t>(x.row[i / 16][i % rows] | 1 << i % 16);
    }
  }
  return all;
}

constexpr Interleavings kInterleavings = make_interleavings();

// Interleaves `runs` dwords of each row, from byte `from` on; zeros past a row's last byte.
template <int kRows>
GROK_AVX512 void interleave_avx512(const char* const* rows, int64_t from, int64_t bytes, int64_t runs, uint32_t* out) {
  const Interleaving& mix = kInterleavings.of[kRows - 1];
  for (int64_t run = 0; run < runs; run += 16, from += 64) {
    const int64_t here = std::clamp<int64_t>(bytes - from, 0, 64);
    const __mmask64 bytes_here = here == 64 ? ~__mmask64{0} : (__mmask64{1} << here) - 1;
    __m512i row[kRows];
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) row[r] = _mm512_maskz_loadu_epi8(bytes_here, rows[r] + from);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i, out += 16) {
      const __m512i from_run = _mm512_load_si512(mix.run[i]);
      __m512i mixed = _mm512_setzero_si512();
#pragma GCC unroll 8
      for (int r = 0; r < kRows; ++r) mixed = _mm512_mask_permutexvar_epi32(mixed, mix.row[i][r], from_run, row[r]);
      const int64_t left = (runs - run) * kRows - i * 16;
      if (left >= 16) {
        _mm512_storeu_si512(out, mixed);
      } else if (left > 0) {
        _mm512_mask_storeu_epi32(out, static_cast<__mmask16>((1 << left) - 1), mixed);
      }
    }
  }
}

constexpr decltype(&interleave_avx512<1>) kInterleave[] = {interleave_avx512<1>, interleave_avx512<2>,
                                                           interleave_avx512<3>, interleave_avx512<4>,
                                                           interleave_avx512<5>, interleave_avx512<6>};

GROK_AVX512_VNNI int32_t sum_avx512(const char* values, int64_t count) {
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < count; i += 64) {
    const __mmask64 here = count - i >= 64 ? ~__mmask64{0} : (__mmask64{1} << (count - i)) - 1;
    sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(1), _mm512_maskz_loadu_epi8(here, values + i));
  }
  int32_t lanes[16], total = 0;  // _mm512_reduce_add_epi32 warns in g++ 12
  _mm512_storeu_si512(lanes, sum);
  for (const int32_t lane : lanes) total += lane;
  return total;
}

// Writes `runs` dwords of columns from byte `from` on, `tile` dwords apart, in the order of a unit of codes.
GROK_AVX2 void spread_codes(const char* row, int64_t from, int64_t runs, int64_t tile, uint32_t* out) {
  const __m128i order = _mm_setr_epi8(0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15);
  for (int64_t run = 0; run < runs; run += 4) {  // a multiple of 8
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + from + 4 * run));
    alignas(16) uint32_t dwords[4];
    _mm_store_si128(reinterpret_cast<__m128i*>(dwords), _mm_shuffle_epi8(bytes, order));
    for (int64_t i = 0; i < 4; ++i, out += tile) *out = dwords[i];
  }
}

// Writes `runs` dwords, an even number: for each 4 columns the even ones in 16 bits each, then the odd ones; zeros past
// the row's last byte.
void spread_int16(const char* row, int64_t from, int64_t bytes, int64_t runs, int64_t tile, uint32_t* out) {
  for (int64_t run = 0; run < runs; run += 2, from += 4) {
    int8_t four[4] = {};
    std::memcpy(four, row + from, std::clamp<int64_t>(bytes - from, 0, 4));
    for (int64_t i = 0; i < 2; ++i, out += tile) {
      *out = static_cast<uint16_t>(four[i]) | static_cast<uint32_t>(static_cast<uint16_t>(four[i + 2])) << 16;
    }
  }
}

GROK_AVX2 void sum_groups_avx2(const char* row, int64_t columns, int64_t each, int16_t* sums) {
  const int8_t* values = reinterpret_cast<const int8_t*>(row);
  for (int64_t k = 0; k < columns; k += each, ++sums) {
    int32_t sum = 0;
    for (int64_t i = k, end = std::min(k + each, columns); i < end; ++i) sum += values[i];
    *sums = static_cast<int16_t>(sum);
  }
}
#endif

// Interleaves `runs` dwords of each of `count` rows, from byte `from` on; zeros past a row's last byte.
void interleave(int64_t count, const char* const* rows, int64_t from, int64_t bytes, int64_t runs, uint32_t* out) {
#if GROK_X86
  kInterleave[count - 1](rows, from, bytes, runs, out);
#else
  for (int64_t r = 0; r < count; ++r) spread(rows[r] + from, bytes - from, runs, count, out + r);
#endif
}

bool divides(int64_t a, int64_t b) { return b % a == 0; }

// Whether integer sums of 128 columns, or of fewer in one group, cover the columns of each group.
bool has_even_groups(const Weights& w) {
  const int64_t group = w.group();
  if (w.subscales.data) {
    return 2 * group <= kScaleGroup && divides(group, kScaleGroup) && divides(kScaleGroup, w.k / w.scales.groups);
  }
  return w.groups == 1 || divides(group, kScaleGroup) || divides(kScaleGroup, group);
}

int64_t columns_of_run(Path path) {
  if (path == Path::f32) return 1;
  return path == Path::bf16 || path == Path::bf16_codes || path == Path::int16 ? 2 : 4;
}

}  // namespace

void spread(const void* row, int64_t bytes, int64_t runs, int64_t step, uint32_t* out) {
  const char* from = static_cast<const char*>(row);
  const int64_t whole = std::clamp<int64_t>(bytes / 4, 0, runs);
  for (int64_t i = 0; i < whole; ++i) std::memcpy(out + i * step, from + 4 * i, 4);
  for (int64_t i = whole; i < runs; ++i) {
    uint32_t last = 0;
    if (4 * i < bytes) std::memcpy(&last, from + 4 * i, bytes - 4 * i);
    out[i * step] = last;
  }
}

Path choose_path(Isa isa, DType x, const Weights& w) {
  const bool bf16 = isa == Isa::avx512_bf16 || isa == Isa::neon_bf16, vnni = bf16 || isa == Isa::avx512_vnni;
  const bool x86 = isa >= Isa::avx2 && isa <= Isa::avx512_bf16;
  if (w.bits) {
    if (!divides(kCodeColumns, w.k) || !divides(kLeastCodeGroup, w.group())) return Path::f32;
    if (x == DType::int8 && x86 && has_even_groups(w)) return Path::codes;
    return x == DType::bf16 && isa == Isa::avx512_bf16 ? Path::bf16_codes : Path::f32;
  }
  if (x == DType::int8 && x86 && w.type == DType::int8 && has_even_groups(w)) {
    const bool several = w.groups > 1 && w.group() % kScaleGroup;
    if (vnni && several && divides(kLeastCodeGroup, w.group())) return Path::int8_groups;
    if ((divides(4, w.group()) || w.groups == 1) && (!vnni || several)) return Path::int16;
  }
  if (x == DType::int8 && w.type == DType::int8 && (w.groups <= 1 || w.group() % kScaleGroup == 0)) {
    return vnni ? Path::int8 : Path::f32;
  }
  const bool pairs = x == DType::bf16 && w.type != DType::f32 && (w.groups <= 1 || w.group() % 4 == 0);
  return bf16 && pairs ? Path::bf16 : Path::f32;
}

PackedRows::PackedRows(Isa isa_, DType x, const Weights& w, const std::vector<int64_t>& offsets)
    : path(choose_path(isa_, x, w)), isa(isa_), k(w.k), run_columns(columns_of_run(path)),
      runs(round_up(k, 4) / run_columns),
      groups(x != DType::int8 || path == Path::f32 ? 0 : (k + kScaleGroup - 1) / kScaleGroup),
      sum_columns(path == Path::codes || path == Path::int8_groups ? std::min(w.group(), kScaleGroup) : 0),
      sum_groups(sum_columns ? (k + sum_columns - 1) / sum_columns : 0), total(offsets.back()) {
  for (size_t e = 0; e + 1 < offsets.size(); ++e) {
    const int64_t rows = offsets[e + 1] - offsets[e], count = (rows + kTile - 1) / kTile;
    const int64_t parts = (count + kRowBlock / kTile - 1) / (kRowBlock / kTile);
    for (int64_t i = 0; i < count; ++i) {  // the heights of tiles differ by 1 at most, and so the tiles of row blocks
      const int64_t begin = offsets[e] + rows * i / count, end = offsets[e] + rows * (i + 1) / count;
      const int64_t tile = static_cast<int64_t>(tiles.size());
      if (i == 0 || i * parts / count != (i - 1) * parts / count) {
        blocks.push_back({static_cast<int64_t>(e), tile, tile, begin, 0});
      }
      tiles.push_back({begin, end - begin, static_cast<int64_t>(blocks.size()) - 1});
      blocks.back().last_tile = tile + 1;
      blocks.back().rows = end - blocks.back().row;
    }
  }
}

int64_t PackedRows::bytes() const {
  const int64_t units = path == Path::bf16_codes ? k / kSumUnit : 0;
  return round_up(total * runs * 4, 64) + round_up(total * units * 4, 64) + round_up(total * groups * 4, 64) * 2 +
         round_up(total * sum_groups * 2, 64);
}

void PackedRows::place(void* workspace) {
  char* at = static_cast<char*>(workspace);
  data = reinterpret_cast<uint32_t*>(at);
  unit_sums = reinterpret_cast<float*>(at += round_up(total * runs * 4, 64));
  scales = reinterpret_cast<float*>(at += path == Path::bf16_codes ? round_up(total * (k / kSumUnit) * 4, 64) : 0);
  bias = reinterpret_cast<int32_t*>(at += round_up(total * groups * 4, 64));
  sums = reinterpret_cast<int16_t*>(at + round_up(total * groups * 4, 64));
}

void PackedRows::pack(const Rows& x, const RowMap& map, Executor& executor) {
  const int64_t values = std::max<int64_t>(1, kTile * k), grain = std::max<int64_t>(1, kValuesPerRange / values);
  executor.parallel_for(static_cast<int64_t>(tiles.size()), grain,
                        [&](int64_t begin, int64_t end) { pack(x, map, begin, end, 0, k); });
}

void PackedRows::pack(const Rows& x, const RowMap& map, int64_t first_tile, int64_t last_tile, int64_t column,
                      int64_t columns) {
  const int64_t size = size_of(x.type), end = column + columns == k ? runs : (column + columns) / run_columns;
  for (int64_t i = first_tile; i < last_tile; ++i) {
    const Tile& t = tiles[i];
    const char* rows[kTile];
    const float* scale[kTile] = {};
    for (int64_t r = 0; r < t.rows; ++r) {
      const int64_t from = map.index ? map.index[t.row + r] / map.divisor : t.row + r - map.first;
      rows[r] = static_cast<const char*>(x.data) + from * x.stride * size;
      if (x.scale) scale[r] = x.scale + from * x.groups;
    }
    for (int64_t run = column / run_columns, last; run < end; run = last) {
      last = std::min(end, (run / kRunBlock + 1) * kRunBlock);
      const int64_t from = run * run_columns - column;
      uint32_t* out = this->at(t, run);
#if GROK_X86
      if (path == Path::codes || path == Path::int16) {
        for (int64_t r = 0; r < t.rows; ++r) {
          if (path == Path::codes) {
            spread_codes(rows[r], from, last - run, t.rows, out + r);
          } else {
            spread_int16(rows[r], from, columns, last - run, t.rows, out + r);
          }
        }
        continue;
      }
#endif
      if (path != Path::f32) {
        interleave(t.rows, rows, from * size, columns * size, last - run, out);
        continue;
      }
      for (int64_t r = 0; r < t.rows; ++r) {
        spread_f32(rows[r], x.type, scale[r], x.groups, from, last - run, columns, t.rows, out + r);
      }
    }
    for (int64_t r = 0; r < t.rows && path == Path::bf16_codes; ++r) {
      const BF16* row = reinterpret_cast<const BF16*>(rows[r]);
      float* to = unit_sums + (t.row + r) * (k / kSumUnit) + column / kSumUnit;
      for (int64_t i = 0; i < columns; i += kSumUnit) {
        float sum = 0.0f;
        for (int64_t j = i; j < i + kSumUnit; ++j) sum += to_float(row[j]);
        *to++ = sum;
      }
    }
    if (!groups) continue;
    for (int64_t r = 0; r < t.rows; ++r) {
      const int64_t to = (t.row + r) * groups + column / kScaleGroup;
      for (int64_t g = 0; g * kScaleGroup < columns; ++g) {
#if GROK_X86
        const int64_t from = g * kScaleGroup;
        if (path == Path::int8) bias[to + g] = -128 * sum_avx512(rows[r] + from, std::min(kScaleGroup, columns - from));
#endif
        scales[to + g] = scale[r][x.groups == 1 ? 0 : g];
      }
#if GROK_X86
      if (sum_columns) {
        sum_groups_avx2(rows[r], columns, sum_columns, sums + (t.row + r) * sum_groups + column / sum_columns);
      }
#endif
    }
  }
}

}  // namespace grok::cpu
