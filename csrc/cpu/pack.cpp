#include "pack.h"

#include <algorithm>
#include <cstring>

#include "../common/types.h"

namespace grok::cpu {
namespace {

constexpr int64_t kPanel = 64;  // outputs
constexpr int64_t kRun = 256;   // bytes: 4 of each output

// A stored (in, out) matrix is read in tiles, so that it goes by once, in pieces of 2 or 4 kB, from its first row to
// its last as a disk wants it, while what is written stays in the L2 cache.
constexpr int64_t kColumns = 64;
constexpr int64_t kPanels = 32;

// Four rows' words become part of four runs, in a form that compilers make shuffles of.
GROK_INLINE void transpose(const char* w, int64_t row, char* out) {
  uint32_t rows[4][4], words[4][4];
  for (int64_t i = 0; i < 4; ++i) std::memcpy(rows[i], w + i * row, sizeof rows[i]);
  for (int64_t i = 0; i < 4; ++i) {
    for (int64_t j = 0; j < 4; ++j) words[j][i] = rows[i][j];
  }
  for (int64_t j = 0; j < 4; ++j) std::memcpy(out + j * kRun, words[j], sizeof words[j]);
}

// An (out, in) matrix: runs are the words of 64 rows, transposed. A cache line of each row at once: the rows' strides
// tend to be such that their lines meet in a few sets of the cache and would not stay there.
void pack_rows(const Pack& p, int64_t panel) {
  constexpr int64_t kLine = 64;
  const char* w = p.w + panel * kPanel * p.row;
  char* out = p.out + panel * p.k * p.item * kPanel;
  const int64_t end = p.k * p.item;
  int64_t byte = 0;
  for (; byte + kLine <= end; byte += kLine) {
    for (int64_t output = 0; output < kPanel; output += 4) {
      for (int64_t at = byte; at < byte + kLine; at += 16) {
        transpose(w + output * p.row + at, p.row, out + at * kPanel + output * 4);
      }
    }
  }
  for (; byte < end; byte += 4) {
    for (int64_t output = 0; output < kPanel; ++output) {
      std::memcpy(out + byte * kPanel + output * 4, w + output * p.row + byte, 4);
    }
  }
}

// An (in, out) matrix: the rows of a run, 64 values of each, interleaved.
template <class T>
void pack_columns(const Pack& p, int64_t panel, int64_t end, int64_t first, int64_t last) {
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
      std::memcpy(p.out + at * p.k * p.item * kPanel + column / run * kRun, mixed, kRun);
    }
  }
}

void pack_any(const Pack& p, int64_t panel, int64_t end, int64_t first, int64_t last) {
  const int64_t run = 4 / p.item;
  for (int64_t at = panel; at < end; ++at) {
    char* out = p.out + at * p.k * p.item * kPanel;
    for (int64_t column = first; column < last; ++column) {
      for (int64_t output = 0; output < kPanel; ++output) {
        std::memcpy(out + column / run * kRun + output * 4 + column % run * p.item,
                    p.w + (at * kPanel + output) * p.row + column * p.col, p.item);
      }
    }
  }
}

}  // namespace

int64_t pack_steps(const Pack& p) {
  return p.col == p.item ? p.n / kPanel : (p.k + kColumns - 1) / kColumns;
}

void pack(const Pack& p, int64_t begin, int64_t end) {
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

void unpack_row(const char* packed, int64_t row, int64_t k, int64_t item, char* out) {
  const char* words = packed + row / kPanel * kPanel * k * item + row % kPanel * 4;
  for (int64_t byte = 0; byte < k * item; byte += 4) std::memcpy(out + byte, words + byte * kPanel, 4);
}

}  // namespace grok::cpu
