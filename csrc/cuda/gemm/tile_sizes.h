#pragma once

#include <algorithm>
#include <cstdint>
#include <initializer_list>

// How the launchers tile a product, as functions of its shape and the chip.

namespace grok::cuda::gemm {

inline int64_t parts(int64_t count, int64_t each) { return (count + each - 1) / each; }

// Columns of a tile in fp8.cuh: those that minimise rounds · clocks of a tile. A tile is bound by shared memory, which
// moves 128 bytes a clock: for 128 columns of K, 128 rows of x are written and read once, and every column of weights
// is written once and read by both warpgroups, 256 + 3 · columns clocks in all.
inline int tile_columns(int64_t rows, int64_t n, int64_t experts, int64_t clusters) {
  constexpr int64_t kHeight = 128, kPair = 2;
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

// Weight rows of a warpgroup in an `Even` block of swapped.cuh, chosen so that the last round of blocks is well filled.
// The host does not know how many experts are hit, so the worst number of them counts; a shorter block wins only if it
// is more than 2% better.
inline int even_height(int64_t n, int64_t experts, int64_t multiprocessors) {
  int best = 0;
  double least = 0;
  for (const int height : {32, 24, 16, 8}) {
    double worst = 0;
    for (int64_t hit = 1; hit <= experts; ++hit) {
      const int64_t rounds = parts(parts(n, 2 * height) * hit, multiprocessors);
      const double rows = static_cast<double>(n * hit) / static_cast<double>(multiprocessors);
      const double loss = static_cast<double>(rounds * 2 * height) / rows;
      if (loss > worst) worst = loss;
    }
    if (best && worst > 0.98 * least) continue;
    best = height;
    least = worst;
  }
  return best;
}

}  // namespace grok::cuda::gemm
