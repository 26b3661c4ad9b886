#include "cpu/gemm/pack_weight.h"

#include <algorithm>
#include <cstring>

#include "common/types.h"
#include "cpu/gemm/layout.h"
#include "cpu/isa.h"

#if GROK_X86
#include <immintrin.h>
#endif

namespace grok::cpu {
namespace {

// One of the matrices, with its strides in bytes.
struct Matrix {
  const char* w;
  char* out;  // its first panel
  int64_t n, k, row, col, item;
};

// An (in, out) matrix is read in pieces of 64 columns × 32 panels: 2 or 4 kB of each of its stored rows, once and in
// the order of the file, as a disk wants it, while what is written stays in L2.
constexpr int64_t kColumns = 64;
constexpr int64_t kPanels = 32;

// Transposes 4 × 4 words: four rows become part of four runs.
#if GROK_X86
GROK_INLINE void transpose(const char* w, int64_t row, char* out) {
  const auto load = [&](int64_t i) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(w + i * row)); };
  const __m128i a = load(0), b = load(1), c = load(2), d = load(3);
  const __m128i ab[] = {_mm_unpacklo_epi32(a, b), _mm_unpackhi_epi32(a, b)};
  const __m128i cd[] = {_mm_unpacklo_epi32(c, d), _mm_unpackhi_epi32(c, d)};
  for (int64_t i = 0; i < 2; ++i) {
    __m128i* to = reinterpret_cast<__m128i*>(out + 2 * i * kRunBytes);
    _mm_storeu_si128(to, _mm_unpacklo_epi64(ab[i], cd[i]));
    _mm_storeu_si128(to + kRunBytes / sizeof(__m128i), _mm_unpackhi_epi64(ab[i], cd[i]));
  }
}
#else
GROK_INLINE void transpose(const char* w, int64_t row, char* out) {
  uint32_t rows[4][4], words[4][4];
  for (int64_t i = 0; i < 4; ++i) std::memcpy(rows[i], w + i * row, sizeof rows[i]);
  for (int64_t i = 0; i < 4; ++i) {
    for (int64_t j = 0; j < 4; ++j) words[j][i] = rows[i][j];
  }
  for (int64_t j = 0; j < 4; ++j) std::memcpy(out + j * kRunBytes, words[j], sizeof words[j]);
}
#endif

// Packs a panel of an (out, in) matrix: the words of 64 rows, transposed. It uses up four cache lines of each row at
// once: with the usual strides the rows' lines fall into a few sets of the cache and would not stay there. One line
// would do for that; four keep what is written in L1, and suit the prefetching by pages.
void pack_rows(const Matrix& p, int64_t panel) {
  constexpr int64_t kPiece = 256;  // bytes
  const char* w = p.w + panel * kPanel * p.row;
  char* out = p.out + panel * p.k * p.item * kPanel;
  const int64_t end = p.k * p.item, whole = end / 16 * 16;
  for (int64_t byte = 0; byte < whole; byte += kPiece) {
    for (int64_t output = 0; output < kPanel; output += 4) {
      for (int64_t at = byte, to = std::min(byte + kPiece, whole); at < to; at += 16) {
        transpose(w + output * p.row + at, p.row, out + at * kPanel + output * 4);
      }
    }
  }
  for (int64_t byte = whole; byte < end; byte += 4) {
    for (int64_t output = 0; output < kPanel; ++output) {
      std::memcpy(out + byte * kPanel + output * 4, w + output * p.row + byte, 4);
    }
  }
}

// Packs columns first..last−1 of panels panel..end−1 of an (in, out) matrix: interleaves its stored rows, 64 values
// of each.
template <class T>
void pack_columns(const Matrix& p, int64_t panel, int64_t end, int64_t first, int64_t last) {
  constexpr int64_t run = 4 / sizeof(T);
  for (int64_t column = first; column < last; column += run) {
    for (int64_t at = panel; at < end; ++at) {
      T values[run][kPanel], mixed[kPanel][run];
      for (int64_t i = 0; i < run; ++i) {
        std::memcpy(values[i], p.w + at * kPanel * sizeof(T) + (column + i) * p.col, sizeof values[i]);
      }
      for (int64_t output = 0; output < kPanel; ++output) {
        for (int64_t i = 0; i < run; ++i) mixed[output][i] = values[i][output];
      }
      std::memcpy(p.out + at * p.k * p.item * kPanel + column / run * kRunBytes, mixed, kRunBytes);
    }
  }
}

// As pack_columns, from any strides.
void pack_any(const Matrix& p, int64_t panel, int64_t end, int64_t first, int64_t last) {
  const int64_t run = 4 / p.item;
  for (int64_t at = panel; at < end; ++at) {
    char* out = p.out + at * p.k * p.item * kPanel;
    for (int64_t column = first; column < last; ++column) {
      for (int64_t output = 0; output < kPanel; ++output) {
        std::memcpy(out + column / run * kRunBytes + output * 4 + column % run * p.item,
                    p.w + (at * kPanel + output) * p.row + column * p.col, p.item);
      }
    }
  }
}

// Steps of the work on one matrix, which may run at the same time: panels, or column ranges of an (in, out) matrix.
int64_t count_steps(const Matrix& p) {
  return p.col == p.item ? p.n / kPanel : (p.k + kColumns - 1) / kColumns;
}

void run_steps(const Matrix& p, int64_t begin, int64_t end) {
  if (p.col == p.item) {
    for (int64_t panel = begin; panel < end; ++panel) pack_rows(p, panel);
    return;
  }
  const auto columns = p.row != p.item ? pack_any : p.item == 1 ? pack_columns<uint8_t> : pack_columns<uint16_t>;
  for (int64_t step = begin; step < end; ++step) {
    const int64_t first = step * kColumns, last = std::min(first + kColumns, p.k), panels = p.n / kPanel;
    for (int64_t panel = 0; panel < panels; panel += kPanels) {
      columns(p, panel, std::min(panel + kPanels, panels), first, last);
    }
  }
}

}  // namespace

void pack_weight(const PackWeight& p, Executor& executor) {
  for (int64_t expert = 0; expert < p.experts; ++expert) {
    Matrix m{};
    m.w = static_cast<const char*>(p.w) + expert * p.expert_stride * p.item;
    m.out = static_cast<char*>(p.packed) + (expert * p.packed_n + p.first_row) * p.k * p.item;
    m.n = p.n;
    m.k = p.k;
    m.row = p.row_stride * p.item;
    m.col = p.column_stride * p.item;
    m.item = p.item;
    const int64_t steps = count_steps(m);
    const int64_t bytes = std::max<int64_t>(1, p.n * p.k * p.item / std::max<int64_t>(1, steps));
    executor.parallel_for(steps, rows_per_range(bytes), [&](int64_t begin, int64_t end) { run_steps(m, begin, end); });
  }
}

}  // namespace grok::cpu
