#pragma once

#include <algorithm>
#include <cstdint>

namespace grok::cuda::gemm {

// How many columns a tile has. Of 128 columns of K, 128 rows of x are written to shared memory and read once, and each
// column of weights is written once and read by both warpgroups: 256 + 3 · columns, in units of 128 bytes, a clock
// each. That is as long as the products take, or longer, and so long lasts a round of tiles; so many rounds the
// clusters need.
inline int tile_columns(int64_t rows, int64_t n, int64_t experts, int64_t clusters) {
  constexpr int64_t kHeight = 128, kPair = 2;
  const auto parts = [](int64_t count, int64_t each) { return (count + each - 1) / each; };
  const int64_t groups = std::max<int64_t>(1, std::min(experts, rows));
  const int64_t row_tiles = groups * parts(parts(rows, groups), kHeight);
  int best = 0;
  int64_t least = 0;
  for (const int columns : {256, 192, 128}) {
    const int64_t cost = parts(row_tiles * parts(n, kPair * columns), clusters) * (256 + 3 * columns);
    if (best && cost >= least) continue;
    best = columns;
    least = cost;
  }
  return best;
}

}  // namespace grok::cuda::gemm
