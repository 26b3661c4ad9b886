#pragma once

#include <cstdint>

#include "../include/grok/gemm.h"
#include "../sm90.cuh"

// What the GEMM kernels share: fp8.cuh for many rows, swapped.cuh with swapped operands.

namespace grok::cuda::gemm {

constexpr int kDepth = 128;          // columns of K in a partial sum; in bytes, also a row of a tile
constexpr int kThreads = 384;        // one warpgroup loads, two multiply
constexpr int kMostShared = 232448;  // bytes of shared memory per block

// A kernel's parameters; those that a launcher does not set are 0.
struct Parameters {
  sm90::TensorMap x, weight;
  const float *x_scale, *weight_scale;
  int64_t x_scale_row, x_scale_group;
  const int32_t* offsets;
  int32_t rows, n, k, experts;
  int32_t step;   // weight rows from the first half of a tile to the second (swapped.cuh: between the parts of a stage)
  int32_t width;  // columns of y
  void* y;
  // of a GroupedGemm
  const int32_t* order;
  const float* row_weights;
  // of a GateUp
  Activation activation;
  float* y_scale;
  int64_t y_scale_row, y_scale_group;
};

// The offset of a byte in a swizzled tile.
__device__ __forceinline__ int in_tile(int row, int byte) { return row * 128 + (byte ^ row % 8 * 16); }

// Which of 128 columns `gather_rows` puts at this place. In each wgmma step of 16 places a thread t (of four) supplies
// places 2t, 2t + 1, 2t + 8 and 2t + 9; the permutation makes its places of 8 steps 32 contiguous columns.
__device__ __forceinline__ int column_at(int place) {
  const int step = place / 16, m = place % 16;
  return m % 8 / 2 * 32 + 4 * step + m / 8 * 2 + m % 2;
}

}  // namespace grok::cuda::gemm
