#pragma once

#include <cstdint>

#include "../include/grok/gemm.h"
#include "../sm90.cuh"

// What the kernels of products share: fp8.cuh, for many rows, and swapped.cuh, with swapped operands.

namespace grok::cuda::gemm {

constexpr int kDepth = 128;          // columns of K that go into one partial sum; of bytes, a line of a tile
constexpr int kThreads = 384;        // a warpgroup that loads, two that multiply
constexpr int kMostShared = 232448;  // bytes of shared memory that a block may have

// A kernel's parameters; what a launcher does not set is 0.
struct Parameters {
  sm90::TensorMap x, weight;
  const float *x_scale, *weight_scale;
  int64_t x_scale_row, x_scale_group;
  const int32_t* offsets;
  int32_t rows, n, k, experts;
  int32_t step;   // rows of the weights from the first half of a tile (swapped: part of a stage) to the second
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

// Where byte `byte` of row `row` lies in a swizzled tile.
__device__ __forceinline__ int in_tile(int row, int byte) { return row * 128 + (byte ^ row % 8 * 16); }

// The column of x, of 128, at place `place` of the order of gather_rows: a thread of the tensor core's operand has the
// columns 2t, 2t + 1, 2t + 8 and 2t + 9 of each step of 16, and so 32 neighbours in 8 steps.
__device__ __forceinline__ int column_at(int place) {
  const int step = place / 16, m = place % 16;
  return m % 8 / 2 * 32 + 4 * step + m / 8 * 2 + m % 2;
}

}  // namespace grok::cuda::gemm
