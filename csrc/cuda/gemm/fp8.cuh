#pragma once

#include <cstdint>
#include <type_traits>

#include "../include/grok/gemm.h"
#include "../sm90.cuh"
#include "activation.cuh"
#include "pipeline.cuh"
#include "quantize.cuh"
#include "schedule.cuh"

// e4m3 × e4m3 for many rows. A block of three warpgroups computes tiles of 128 rows by kHalves · kColumns columns: one
// warpgroup loads, two multiply 64 rows each. Of every 128 columns of K a warpgroup takes first one half of its
// columns, then the other, through one set of partial sums: four products of 32, then the sum times the row's scale
// goes into fp32. While one warpgroup does that, the other has the tensor core.
//
// Two blocks of a cluster take the same rows and neighbouring columns; each loads one half of the rows for both.

namespace grok::cuda::gemm {

constexpr int kRows = 128, kDepth = 128;  // of a tile; kDepth bytes of K a stage
constexpr int kThreads = 384, kCluster = 2;
constexpr int kTileBytes = 64 * 128;  // 64 rows of a result's tile

// What becomes of the sums: rows of bf16; rows of fp32, in their place or weighted and scattered; act(gate) · up in
// e4m3.
struct ToBf16 {};
struct ToFp32 {};
struct ToGated {};

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

// One thread: the tiles of x and of the weights.
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
      sm90::load_tile_to(3, stage.x + rank * kHalfRows * kDepth, p.x, full, k, tile.row + rank * kHalfRows);
#pragma unroll
      for (int half = 0; half < kHalves; ++half)
        sm90::load_tile(stage.weight[half], p.weight, full, k, column + half * p.half, tile.expert);
    }
  }
}

// One warp: the scales of x.
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
  // No block may end while others arrive at its barriers, nor this warp while copies are under way: all stages come
  // back.
  for (int i = 0; i < Config::kStages; ++i, at.advance()) wait_empty(shared.ring, at);
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

// Multiplies one stage. kSums partial sums in registers, kHalves · kSums whole ones.
template <class Config, int kHalves, int kColumns>
__device__ __forceinline__ void multiply_stage(typename Config::Shared& shared, Position<Config::kStages>& at,
                                               const Place& me, float (&sums)[kHalves * kColumns / 2]) {
  constexpr int kSums = kColumns / 2;
  wait_full(shared.ring, at);
  const auto& stage = shared.stages[at.stage];
  const float scale[2] = {shared.scale[at.stage][me.row], shared.scale[at.stage][me.row + 8]};
  const uint64_t x = sm90::operand(stage.x + me.group * kTileBytes);
#pragma unroll
  for (int half = 0; half < kHalves; ++half) {
    const uint64_t weight = sm90::operand(stage.weight[half]);
    float partial[kSums];
    sm90::fence_products();
#pragma unroll
    for (int k = 0; k < kDepth; k += 32)
      sm90::multiply<kColumns>(partial, sm90::advance(x, k), sm90::advance(weight, k), k > 0);
    sm90::commit_products();
    sm90::wait_products<0>();
    if (half == kHalves - 1) {
      __syncwarp();  // all lanes have their scales
      if (sm90::lane_index() < kCluster) sm90::arrive_at(shared.ring.empty[at.stage], sm90::lane_index());
    }
#pragma unroll
    for (int i = 0; i < kSums; ++i) sums[half * kSums + i] = fmaf(scale[i / 2 % 2], partial[i], sums[half * kSums + i]);
  }
  at.advance();
}

// The thread's sums, of columns from `column` on, times the scales of the weights. There are none from `last` on.
template <int kSums>
__device__ __forceinline__ void scale_columns(const Fp8& p, int32_t expert, int column, int last, float* sums) {
  const float* scale = p.weight_scale + static_cast<int64_t>(expert) * p.n;
#pragma unroll
  for (int i = 0; i < kSums; i += 4) {
    const int at = column + 2 * i;
    const float2 s = at < last ? *reinterpret_cast<const float2*>(scale + at) : make_float2(0.0f, 0.0f);
    sums[i] *= s.x;
    sums[i + 1] *= s.y;
    sums[i + 2] *= s.x;
    sums[i + 3] *= s.y;
  }
}

// Before a warpgroup fills a tile of y again: the store before the last has read its tile.
__device__ __forceinline__ void reuse_buffer(const Place& me) {
  if (threadIdx.x % 128 == 0) sm90::wait_stores_read<1>();
  sm90::named_barrier(1 + me.group, 128);
}

__device__ __forceinline__ void store_buffer(const Fp8& p, const Place& me, const uint8_t* tile, int column, int row) {
  sm90::fence_async();
  sm90::named_barrier(1 + me.group, 128);
  if (threadIdx.x % 128 == 0) {
    sm90::store_tile(p.y, tile, column, row);
    sm90::commit_stores();
  }
}

template <int kCount, class Buffers>
__device__ __forceinline__ void store_bf16(const Fp8& p, const Place& me, const Tile& tile, int column,
                                           const float (&sums)[kCount], Buffers& buffers, int& next) {
  if (tile.row + 64 * me.group + 64 <= tile.end) {
    const int lane = sm90::lane_index(), row = 16 * me.warp + lane % 16;
#pragma unroll
    for (int c = 0; c < 2 * kCount; c += 64, next ^= 1) {
      if (column + c >= p.width) break;
      reuse_buffer(me);
      uint8_t* buffer = buffers[next];
#pragma unroll
      for (int j = 0; j < 64; j += 16) {  // columns: a matrix of 8 for each half of the rows, and the next
        const float* v = sums + (c + j) / 2;
        sm90::store_matrices(buffer + in_tile(row, 2 * j + lane / 16 * 16), sm90::pack_bf16(v[0], v[1]),
                             sm90::pack_bf16(v[2], v[3]), sm90::pack_bf16(v[4], v[5]), sm90::pack_bf16(v[6], v[7]));
      }
      store_buffer(p, me, buffer, column + c, tile.row + 64 * me.group);
    }
    return;
  }
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = tile.row + me.row + 8 * h;
    if (row >= tile.end) continue;
    uint16_t* y = static_cast<uint16_t*>(p.y_data) + static_cast<int64_t>(row) * p.width;
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const int at = column + 2 * i + me.pair;
      if (at < p.width) *reinterpret_cast<uint32_t*>(y + at) = sm90::pack_bf16(sums[i + 2 * h], sums[i + 2 * h + 1]);
    }
  }
}

template <int kCount>
__device__ __forceinline__ void store_fp32(const Fp8& p, const Place& me, const Tile& tile, int column,
                                           const float (&sums)[kCount]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = tile.row + me.row + 8 * h;
    if (row >= tile.end) continue;
    const int32_t to = p.order ? p.order[row] : row;
    const float weight = p.order ? p.row_weights[to] : 1.0f;
    float* y = static_cast<float*>(p.y_data) + static_cast<int64_t>(to) * p.width;
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const int at = column + 2 * i + me.pair;
      if (at < p.width)
        *reinterpret_cast<float2*>(y + at) = make_float2(weight * sums[i + 2 * h], weight * sums[i + 2 * h + 1]);
    }
  }
}

// act(gate) · up of the thread's 2 rows and 32 columns of each, in e4m3 with a scale a row.
template <class Buffers>
__device__ __forceinline__ void store_gate_up(const Fp8& p, const Place& me, const Tile& tile, int column,
                                              float (&sums)[128], Buffers& buffers, int& next) {
  if (column >= p.width) return;  // the second block of the last pair may have no columns
  apply_gate<64>(p.activation, sums, sums + 64);
  uint32_t amax[2] = {};
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    if (column + i / 4 * 8 + me.pair >= p.width) sums[i] = 0.0f;
    amax[i / 2 % 2] = max(amax[i / 2 % 2], magnitude(sums[i]));
  }
#pragma unroll
  for (uint32_t& largest : amax) {  // the row's other columns are in the lanes beside
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, 1));
    largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, 2));
  }
  const Divisor scale[2] = {scale_of(amax[0]), scale_of(amax[1])};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = tile.row + me.row + 8 * h;
    if (me.pair == 0 && row < tile.end)
      p.y_scale[row * p.y_scale_row + column / kGroup * p.y_scale_group] = scale[h].value;
  }
  if (tile.row + 64 * me.group + 64 <= tile.end) {
    reuse_buffer(me);
    uint8_t* buffer = buffers[next];
    const int row = sm90::opaque(me.row % 64);  // its addresses would else occupy registers through the products
#pragma unroll
    for (int i = 0; i < 64; i += 8) {  // 16 columns: one chunk of each row
      uint8_t* chunk = buffer + in_tile(row, 2 * i);
#pragma unroll
      for (int j = 0; j < 8; j += 2)
        sm90::write_tile(reinterpret_cast<uint16_t*>(chunk + j / 2 % 2 * 8 * 128 + j / 4 * 8 + me.pair),
                         quantize(sums[i + j], sums[i + j + 1], scale[j / 2 % 2]));
    }
    store_buffer(p, me, buffer, column, tile.row + 64 * me.group);
    next ^= 1;
    return;
  }
#pragma unroll
  for (int i = 0; i < 64; i += 2) {
    const int row = tile.row + me.row + i / 2 % 2 * 8, at = column + i / 4 * 8 + me.pair;
    if (row < tile.end && at < p.width)
      *reinterpret_cast<uint16_t*>(static_cast<uint8_t*>(p.y_data) + static_cast<int64_t>(row) * p.width + at) =
          quantize(sums[i], sums[i + 1], scale[i / 2 % 2]);
  }
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
      scale_columns<kSums>(p, tile.expert, column + half * p.half + me.pair,
                           std::is_same_v<Output, ToGated> ? (half + 1) * p.half : p.n, sums + half * kSums);
      // or the compiler would load the scales of both halves first, and lack registers
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
    if (!std::is_same_v<Output, ToFp32>) sm90::prefetch(p.y);
    shared.ring.init(1 + 32, kCluster * 8);  // the thread and the warp that load; the warps that multiply
    sm90::fence_barrier_init();
  }
  __syncthreads();
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
  sm90::cluster_sync();
}

}  // namespace grok::cuda::gemm
