#pragma once

#include <cstdint>
#include <type_traits>

#include "../include/grok/gemm.h"
#include "../sm90.cuh"
#include "outputs.h"
#include "pipeline.cuh"
#include "schedule.cuh"

// The parameters of the kernels in fp8.cuh, their tiles, and who has what of one.

namespace grok::cuda::gemm {

constexpr int kRows = 128, kDepth = 128;  // of a tile; kDepth bytes of K a stage
constexpr int kThreads = 384, kCluster = 2;
constexpr int kTileBytes = 64 * 128;  // 64 rows of a result's tile

struct Fp8 {
  sm90::TensorMap x, weight, y;
  const float *x_scale, *weight_scale;
  int64_t x_scale_row, x_scale_group;
  const int32_t* offsets;
  int32_t rows, n, k, experts;
  int32_t half;   // rows of the weights from one half of a tile to the other
  int32_t width;  // columns of y
  void* y_data;
  // ToFp32
  const int32_t* order;
  const float* row_weights;
  // ToGated
  Activation activation;
  float* y_scale;
  int64_t y_scale_row, y_scale_group;
};

template <class Output, int kHalves, int kColumns>
struct Fp8Tile {
  static constexpr int kWidth = std::is_same_v<Output, ToGated> ? kColumns : kHalves * kColumns;  // of y
  static constexpr int kSums = kColumns / 2;  // a thread, of one half
  // Tiles of 128 bytes that a warpgroup fills while those before are still being stored.
  static constexpr int kBuffers = std::is_same_v<Output, ToFp32> ? 0 : 2;

  struct Stage {
    uint8_t x[kRows * kDepth];
    uint8_t weight[kHalves][kColumns * kDepth];
  };
  static constexpr int kStageBytes = sizeof(Stage) + kRows * sizeof(float);
  static constexpr int kMost = 232448, kOther = 1024 + 2 * kBuffers * kTileBytes;  // bytes of shared memory
  static constexpr int kStages = (kMost - kOther) / kStageBytes;

  struct Shared {
    alignas(1024) Stage stages[kStages];
    alignas(1024) uint8_t y[2][kBuffers > 0 ? kBuffers : 1][kBuffers > 0 ? kTileBytes : 16];
    float scale[kStages][kRows];
    Ring<kStages> ring;
    Schedule schedule;
  };
  static_assert(sizeof(Shared) <= kMost && kStages >= 4, "stages that cover the way to memory");
};

// Where byte `byte` of row `row` lies in a swizzled tile.
__device__ __forceinline__ int in_tile(int row, int byte) { return row * 128 + (byte ^ row % 8 * 16); }

// The tiles of a block: of a pair of neighbouring ones it has that of its rank.
__device__ __forceinline__ Walk<kRows> walk(const Fp8& p, const Schedule& schedule) {
  return {schedule, p.experts, static_cast<int32_t>(blockIdx.x / kCluster), static_cast<int32_t>(gridDim.x / kCluster)};
}

template <class Config>
__device__ __forceinline__ int first_column(const Tile& tile) {
  return (tile.column * kCluster + static_cast<int>(sm90::cluster_rank())) * Config::kWidth;
}

// A thread of a warpgroup that multiplies: its two rows of the tile are `row` and `row` + 8; its columns come in pairs,
// 8i + `pair` and the next.
struct Place {
  int group, warp, row, pair;
  __device__ __forceinline__ Place()
      : group(sm90::warp_index() / 4 - 1),
        warp(sm90::warp_index() % 4),
        row(64 * group + 16 * warp + sm90::lane_index() / 4),
        pair(sm90::lane_index() % 4 * 2) {}
};

}  // namespace grok::cuda::gemm
