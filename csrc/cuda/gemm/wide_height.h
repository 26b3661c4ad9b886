#pragma once

#include <cstdint>
#include <initializer_list>

namespace grok::cuda::gemm::wide {

// How many rows of the weights a warpgroup has of a block that no more than 64 rows share: so that the rounds of blocks
// over the multiprocessors come out even, whatever number of experts is hit, which the host does not know. The worst of
// those numbers counts, and a taller block wins where it loses no more than a fiftieth.
inline int even_height(int64_t n, int64_t experts, int64_t multiprocessors) {
  const auto parts = [](int64_t count, int64_t each) { return (count + each - 1) / each; };
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

}  // namespace grok::cuda::gemm::wide
