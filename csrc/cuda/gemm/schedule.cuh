#pragma once

#include <cstdint>

#include "../include/grok/gemm.h"
#include "../sm90.cuh"

// Which tile a block computes next. Only the device knows the groups of rows, so every block reads the offsets and
// walks over the same list of tiles: expert by expert, in bands of kBand tiles along M, column by column within a band.
// Blocks that run at the same time then share rows and columns, and read most of both from L2.

namespace grok::cuda::gemm {

constexpr int kBand = 16;

struct Tile {
  int32_t expert;
  int32_t row, end;  // its first row; one past the last row of its expert
  int32_t column;    // counted in tiles
};

// In shared memory.
struct Schedule {
  int32_t offsets[kMostExperts + 1];
  int32_t before[kMostExperts + 1];  // tiles of all earlier experts
  int32_t columns;                   // tiles along N
};

__host__ __device__ constexpr int32_t tiles(int64_t count, int64_t each) {
  return static_cast<int32_t>((count + each - 1) / each);
}

// Called by every thread; a barrier must follow before the schedule is read. All offsets are loaded in parallel, so
// that their memory latency is paid once.
template <int kRows>
__device__ __forceinline__ void fill(Schedule& s, const int32_t* offsets, int32_t rows, int32_t experts,
                                     int32_t columns) {
  const int e = static_cast<int>(threadIdx.x);
  if (e <= experts) s.offsets[e] = offsets ? offsets[e] : e * rows;
  if (e == 0) s.columns = columns;
  __syncthreads();
  if (e > experts) return;
  int32_t count = 0;
  for (int i = 0; i < e; ++i) count += tiles(s.offsets[i + 1] - s.offsets[i], kRows) * columns;
  s.before[e] = count;
}

// Every `step`-th tile of the list, from `first` on.
template <int kRows>
class Walk {
 public:
  __device__ __forceinline__ Walk(const Schedule& schedule, int32_t experts, int32_t first, int32_t step)
      : s_(schedule), experts_(experts), index_(first), step_(step) {}

  // False when there are no more tiles.
  __device__ __forceinline__ bool next(Tile& tile) {
    while (expert_ < experts_ && index_ >= s_.before[expert_ + 1]) ++expert_;
    if (expert_ == experts_) return false;
    const int32_t begin = s_.offsets[expert_], end = s_.offsets[expert_ + 1], at = index_ - s_.before[expert_];
    const int32_t band = at / (kBand * s_.columns), in_band = at - band * kBand * s_.columns;
    const int32_t left = tiles(end - begin, kRows) - band * kBand, high = left < kBand ? left : kBand;
    const int32_t column = in_band / high, row = in_band - column * high;
    tile = {expert_, begin + (band * kBand + row) * kRows, end, column};
    index_ += step_;
    return true;
  }

 private:
  const Schedule& s_;
  int32_t experts_, index_, step_, expert_ = 0;
};

}  // namespace grok::cuda::gemm
