#pragma once

#include <cstdint>

namespace grok::cpu {

// Rows of one matrix (n, k) into their panels: out[panel][j][output][i] = w[64 panel + output][j · run + i], where a
// run of 4 bytes holds `run` values. grok_kernels/packing.py describes the form.
struct Pack {
  const char* w;      // row 0, of any alignment
  char* out;          // panel 0
  int64_t n, k;       // n a multiple of 64, k of 4
  int64_t row, col;   // bytes from a row, and from a column, of w to the next
  int64_t item;       // bytes of a value: 1 or 2
};

// Steps of the work, that may run at the same time, and the steps begin..end-1.
int64_t pack_steps(const Pack& p);
void pack(const Pack& p, int64_t begin, int64_t end);

// One row back: k · item bytes from the packed matrix at `packed`.
void unpack_row(const char* packed, int64_t row, int64_t k, int64_t item, char* out);

}  // namespace grok::cpu
