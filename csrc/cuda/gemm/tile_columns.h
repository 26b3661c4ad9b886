#pragma once

#include <algorithm>
#include <cstdint>

namespace grok::cuda::gemm {

// How many columns a tile has. Of 128 columns of K a block brings (64 + columns) · 128 bytes from L2, and that, or the
// products, which grow alike, takes as long as a tile lasts; so many rounds of tiles the clusters need.
inline int tile_columns(int64_t rows, int64_t n, int64_t experts, int64_t clusters) {
  constexpr int64_t kHeight = 128, kPair = 2;
  const auto parts = [](int64_t count, int64_t each) { return (count + each - 1) / each; };
  const int64_t groups = std::max<int64_t>(1, std::min(experts, rows));
  const int64_t row_tiles = groups * parts(parts(rows, groups), kHeight);
  int best = 0;
  int64_t least = 0;
  for (const int columns : {256, 192, 128}) {
    const int64_t cost = parts(row_tiles * parts(n, kPair * columns), clusters) * (64 + columns);
    if (best && cost >= least) continue;
    best = columns;
    least = cost;
  }
  return best;
}

}  // namespace grok::cuda::gemm
