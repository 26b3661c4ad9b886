#pragma once

#include <cstdint>

#include "../include/grok/wide.h"
#include "wide_tile.cuh"

namespace grok::cuda::gemm::wide {

constexpr int kRowThreads = 256, kRowWarps = kRowThreads / 32;

// A warp takes 128 columns of a row. A lane writes four neighbours, which it finds in two pairs.
__global__ void __launch_bounds__(kRowThreads) gather_rows_kernel(const GatherRows p) {
  const int64_t row = blockIdx.x, group = int64_t{blockIdx.y} * kRowWarps + sm90::warp_index();
  if (128 * group >= p.dim || (p.order && row >= p.offsets[p.experts])) return;
  const uint16_t* x = p.x + (p.order ? p.order[row] / p.active : row) * p.x_stride;
  const int64_t width = int64_t{tiles(p.dim, 128)} * 128;
  const int place = 4 * sm90::lane_index();
  uint32_t pairs[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t column = 128 * group + column_at(place + 2 * i);
    pairs[i] = column < p.dim ? *reinterpret_cast<const uint32_t*>(x + column) : 0;
  }
  *reinterpret_cast<uint2*>(p.y + row * width + 128 * group + place) = make_uint2(pairs[0], pairs[1]);
}

}  // namespace grok::cuda::gemm::wide
