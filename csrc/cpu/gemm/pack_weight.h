#pragma once

#include <cstdint>

#include "cpu/executor.h"

namespace grok::cpu {

// Writes rows of matrices (experts, n, k) into a weight in Layout::panels (layout.h):
// packed[expert][panel][run][output][i] = w[expert][64 panel + output − first_row][columns_per_run · run + i].
struct PackWeight {
  const void* w;  // (experts, n, k), of any alignment
  void* packed;   // (experts, packed_n / 64, k / columns_per_run, 64, columns_per_run), contiguous
  int64_t experts, n, k;                              // n a multiple of 64, k of 4
  int64_t expert_stride, row_stride, column_stride;   // of w, in elements
  int64_t packed_n, first_row;                        // multiples of 64
  int64_t item;                                       // bytes of an element: 1 or 2
};
void pack_weight(const PackWeight& p, Executor& executor);

}  // namespace grok::cpu
