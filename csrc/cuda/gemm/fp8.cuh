#pragma once

#include <type_traits>

#include "fp8_store.cuh"
#include "pipeline.cuh"

// e4m3 × e4m3 for many rows. A block of three warpgroups computes tiles of 128 rows by kHalves · kColumns columns: one
// warpgroup loads, two multiply 64 rows each. For every 128 columns of K, a warpgroup computes its columns in halves
// that share one set of partial sums: four wgmma of 32 columns of K, then the partial sums, times the scale of the row,
// are added to totals in fp32 (promotion). While one warpgroup promotes, the other can use the tensor core.
//
// The two blocks of a cluster compute the same rows and neighbouring columns; each loads half of the rows for both.

namespace grok::cuda::gemm {

// The output: bf16 rows; fp32 rows, in place or weighted and scattered; or act(gate) · up in e4m3.
struct ToBf16 {};
struct ToFp32 {};
struct ToGated {};

constexpr int kRows = 128, kCluster = 2;  // rows of a tile; blocks of a cluster

template <class Output, int kHalves, int kColumns>
struct Fp8Tile {
  static constexpr int kWidth = std::is_same_v<Output, ToGated> ? kColumns : kHalves * kColumns;  // columns of y
  static constexpr int kSums = kColumns / 2;  // of one half, per thread
  // Staging tiles of a warpgroup: it fills one while the copy engine still stores the other.
  static constexpr int kBuffers = std::is_same_v<Output, ToFp32> ? 0 : 2;

  struct Stage {
    uint8_t x[kRows * kDepth];
    uint8_t weight[kHalves][kColumns * kDepth];
  };
  static constexpr int kStageBytes = sizeof(Stage) + kRows * sizeof(float);
  static constexpr int kOther = 1024 + 2 * kBuffers * kTileBytes;  // bytes of shared memory beside the stages
  static constexpr int kStages = (kMostShared - kOther) / kStageBytes;

  struct Shared {
    alignas(1024) Stage stages[kStages];
    alignas(1024) uint8_t y[2][kBuffers > 0 ? kBuffers : 1][kBuffers > 0 ? kTileBytes : 16];
    float scale[kStages][kRows];
    Ring<kStages> ring;
    Schedule schedule;
  };
  static_assert(sizeof(Shared) <= kMostShared && kStages >= 4, "stages that cover the way to memory");
};

// The tiles of a block. Indices count pairs of tiles along N; a block takes the tile of its rank in the cluster.
__device__ __forceinline__ Walk<kRows> walk(const Fp8& p, const Schedule& schedule) {
  return {schedule, p.experts, static_cast<int32_t>(blockIdx.x / kCluster), static_cast<int32_t>(gridDim.x / kCluster)};
}

template <class Config>
__device__ __forceinline__ int first_column(const Tile& tile) {
  return (tile.column * kCluster + static_cast<int>(sm90::cluster_rank())) * Config::kWidth;
}

// Run by one thread: loads the tiles of x and of the weights.
template <class Config, int kHalves, int kColumns>
__device__ __forceinline__ void load_tiles(const Fp8& p, typename Config::Shared& shared) {
  const int rank = static_cast<int>(sm90::cluster_rank());
  constexpr int kHalfRows = kRows / kCluster;
  auto list = walk(p, shared.schedule);
  Position<Config::kStages> at;
  for (Tile tile; list.next(tile);) {
    const int column = first_column<Config>(tile);
    for (int k = 0; k < p.k; k += kDepth, at.advance()) {
      wait_empty(shared.ring, at);
      auto& stage = shared.stages[at.stage];
      sm90::Barrier& full = shared.ring.full[at.stage];
      sm90::arrive_expecting(full, sizeof stage);
      sm90::load_tile_to((1 << kCluster) - 1, stage.x + rank * kHalfRows * kDepth, p.x, full, k,
                         tile.row + rank * kHalfRows);
#pragma unroll
      for (int half = 0; half < kHalves; ++half)
        sm90::load_tile(stage.weight[half], p.weight, full, k, column + half * p.step, tile.expert);
    }
  }
}

// Run by one warp: loads the scales of x.
template <class Config>
__device__ __forceinline__ void load_scales(const Fp8& p, typename Config::Shared& shared) {
  auto list = walk(p, shared.schedule);
  Position<Config::kStages> at;
  for (Tile tile; list.next(tile);)
    for (int k = 0; k < p.k; k += kDepth, at.advance()) {
      wait_empty(shared.ring, at);
      const float* from = p.x_scale + k / kDepth * p.x_scale_group;
#pragma unroll
      for (int i = 0; i < kRows / 32; ++i) {
        const int row = 32 * i + sm90::lane_index();
        sm90::copy_4_bytes(&shared.scale[at.stage][row], from + (tile.row + row) * p.x_scale_row,
                           tile.row + row < tile.end);
      }
      sm90::arrive_after_copies(shared.ring.full[at.stage]);
    }
}

// Multiplies one stage. Registers hold kSums partial sums, kHalves · kSums totals, and the rows of x, which are loaded
// once for all columns: reading them from shared memory in each wgmma would cost bandwidth that is scarce here
// (NOTES.md).
template <class Config, int kHalves, int kColumns>
__device__ __forceinline__ void multiply_stage(typename Config::Shared& shared, Position<Config::kStages>& at,
                                               const Place& me, float (&sums)[kHalves * kColumns / 2]) {
  constexpr int kSums = kColumns / 2;
  wait_full(shared.ring, at);
  const auto& stage = shared.stages[at.stage];
  const float scale[2] = {shared.scale[at.stage][me.row], shared.scale[at.stage][me.row + 8]};
  uint32_t x[kDepth / 32][4];
  // opaque: otherwise the compiler keeps the addresses in registers from one stage to the next
  const int lane = sm90::opaque(sm90::lane_index());
#pragma unroll
  for (int k = 0; k < kDepth; k += 32)
    sm90::load_matrices(x[k / 32], stage.x + in_tile(me.row / 16 * 16 + lane % 16, k + lane / 16 * 16));
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    const uint64_t weight = sm90::operand(stage.weight[half]);
    float partial[kSums];
    sm90::fence_products();
#pragma unroll
    for (int k = 0; k < kDepth; k += 32)
      sm90::multiply_e4m3<kColumns>(partial, x[k / 32], sm90::advance(weight, k), k > 0);
    sm90::commit_products();
    sm90::wait_products<0>(partial);
    if (half == kHalves - 1) {
      __syncwarp();  // all lanes have read their scales
      if (sm90::lane_index() < kCluster) sm90::arrive_at(shared.ring.empty[at.stage], sm90::lane_index());
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[half * kSums + i] = fmaf(scale[i / 2 % 2], partial[i], sums[half * kSums + i]);
  }
  at.advance();
}

template <class Output, int kHalves, int kColumns>
__device__ __forceinline__ void multiply_tiles(const Fp8& p,
                                               typename Fp8Tile<Output, kHalves, kColumns>::Shared& shared) {
  using Config = Fp8Tile<Output, kHalves, kColumns>;
  constexpr int kSums = Config::kSums;
  const Place me;
  auto list = walk(p, shared.schedule);
  Position<Config::kStages> at;
  int buffer = 0;
  for (Tile tile; list.next(tile);) {
    float sums[kHalves * kSums];
#pragma unroll
    for (float& sum : sums) sum = 0.0f;
    for (int k = 0; k < p.k; k += kDepth) multiply_stage<Config, kHalves, kColumns>(shared, at, me, sums);
    const int column = first_column<Config>(tile);
#pragma unroll
    for (int half = 0; half < kHalves; ++half) {
      scale_columns<kSums>(p, tile.expert, column + half * p.step + me.pair,
                           std::is_same_v<Output, ToGated> ? (half + 1) * p.step : p.n, sums + half * kSums);
      // keeps the compiler from loading the scales of both halves first, for which registers do not suffice
      if constexpr (std::is_same_v<Output, ToGated>) __syncwarp();
    }
    if constexpr (std::is_same_v<Output, ToBf16>) store_bf16(p, me, tile, column, sums, shared.y[me.group], buffer);
    if constexpr (std::is_same_v<Output, ToFp32>) store_fp32(p, me, tile, column, sums);
    if constexpr (std::is_same_v<Output, ToGated>) store_gate_up(p, me, tile, column, sums, shared.y[me.group], buffer);
  }
  if (threadIdx.x % 128 == 0) sm90::wait_stores_read<0>();
}

template <class Output, int kHalves, int kColumns>
__global__ void __launch_bounds__(kThreads, 1) fp8_kernel(const __grid_constant__ Fp8 p) {
  using Config = Fp8Tile<Output, kHalves, kColumns>;
  auto& shared = sm90::shared_memory<typename Config::Shared>();
  const int pairs = tiles(p.width, Config::kWidth * kCluster);
  fill<kRows>(shared.schedule, p.offsets, p.rows, p.experts, pairs);
  if (threadIdx.x == 0) {
    sm90::prefetch(p.x);
    sm90::prefetch(p.weight);
    if (!std::is_same_v<Output, ToFp32>) sm90::prefetch(p.y_tiles);
    shared.ring.init(1 + 32, kCluster * 8);  // the loading thread and warp; the multiplying warps of the cluster
    sm90::fence_barrier_init();
  }
  sm90::cluster_sync();
  if (threadIdx.x < 128) {
    sm90::release_registers<40>();
    if (sm90::warp_index() == 0 && sm90::elect_one()) load_tiles<Config, kHalves, kColumns>(p, shared);
    if (sm90::warp_index() == 1) load_scales<Config>(p, shared);
  } else {
    sm90::claim_registers<232>();
    multiply_tiles<Output, kHalves, kColumns>(p, shared);
  }
  __syncwarp();
  sm90::cluster_sync();  // a block must not exit while the other may still arrive at its barriers
}

}  // namespace grok::cuda::gemm
