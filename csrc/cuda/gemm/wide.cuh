#pragma once

#include <cstdint>

#include "../sm90.cuh"
#include "wide_int8.cuh"
#include "wide_store.cuh"
#include "wide_tile.cuh"

// Products with the weights on the side of 64 rows: e4m3 × e4m3 for few rows, where nothing but the bytes of the weights
// should cost time, and int8 × bf16 for any number.
//
// One thread keeps the tiles of as many stages under way as shared memory holds. Two warpgroups multiply other rows of
// the weights with the same rows of x; of every 128 columns of K, a chain of products into a partial sum, and that, times
// the scale of the row of x (e4m3) or of the weights and their group of K (int8), into fp32. Nobody waits for more than
// its own part, and int8 is converted while the part before is multiplied.

namespace grok::cuda::gemm::wide {

// The tile of this number; false where there are no more.
template <class Config>
__device__ __forceinline__ bool find(const Wide& p, const Schedule& schedule, int32_t index, Tile& tile) {
  return Walk<Config::kWidth>(schedule, p.experts, index, 0).next(tile);
}

// One warp: a thread of it the tiles, all the scales of x.
template <class Config>
__device__ __forceinline__ void load(const Wide& p, typename Config::Shared& shared) {
  constexpr int kXColumns = Config::kInt8 ? 64 : 128;  // of a tile of 128 bytes
  const bool leads = sm90::elect_one();
  const int rows = Config::kParts ? Config::kPartRows : 2 * p.height;
  Position<Config::kStages> at;
  Tile tile;
  for (auto index = static_cast<int32_t>(blockIdx.x); find<Config>(p, shared.schedule, index, tile);
       index += static_cast<int32_t>(gridDim.x)) {
    const int first = tile.column * Config::block_rows(p);
    for (int k = 0; k < p.k; k += Config::kDepths * kDepth, at.advance()) {
      wait_empty(shared.ring, at);
      auto& stage = shared.stages[at.stage];
      sm90::Barrier& full = shared.ring.full[at.stage];
      if (leads) {
        sm90::arrive_expecting(full, 2 * rows * 128 + sizeof stage.x);
#pragma unroll
        for (int part = 0; part < 2; ++part)
          sm90::load_tile(stage.weight[part], p.weight, full, Config::kParts ? k : k + part * kDepth,
                          Config::kParts ? first + part * p.step : first, tile.expert);
#pragma unroll
        for (int i = 0; i < Config::kXTiles; ++i) sm90::load_tile(stage.x[i], p.x, full, k + i * kXColumns, tile.row);
      }
      if constexpr (!Config::kInt8) {
#pragma unroll
        for (int i = sm90::lane_index(); i < Config::kScales; i += 32) {
          const int row = tile.row + i % Config::kWidth, group = k / kDepth + i / Config::kWidth;
          const bool there = row < tile.end && group * kDepth < p.k;
          sm90::copy_4_bytes(&shared.scale[at.stage][i], p.x_scale + row * p.x_scale_row + group * p.x_scale_group,
                             there);
        }
        sm90::arrive_after_copies(full);
      }
    }
  }
  for (int i = 0; i < Config::kStages; ++i, at.advance()) wait_empty(shared.ring, at);  // no copy outlives its thread
}

// The products of one part of a stage, under way; done, where one part's are all that registers hold.
template <class Config>
__device__ __forceinline__ void start_part(const typename Config::Shared& shared, int at, int part,
                                           const Place<Config>& me, float (&partial)[Config::kSums]) {
  const auto& stage = shared.stages[at];
  const uint8_t* weight = stage.weight[part];
  const auto* x = stage.x + (Config::kParts ? 0 : part * Config::kXTiles / 2);
  if constexpr (Config::kInt8) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a[4][4];
      load_operands(weight, half, shared.upper, me, a);
      const uint64_t b = sm90::operand(x[half]);
      sm90::fence_products();
#pragma unroll
      for (int step = 0; step < 4; ++step)
        sm90::multiply<Config::kWidth>(partial, a[step], sm90::advance(b, 32 * step), half + step > 0);
      if (half || Config::kFlights == 1) sm90::commit_products();
      if (Config::kFlights == 1) sm90::wait_products<0>(partial);
    }
  } else {
    const uint64_t a = sm90::operand(weight + me.group * me.height * 128), b = sm90::operand(*x);
    sm90::fence_products();
#pragma unroll
    for (int k = 0; k < kDepth; k += 32)
      sm90::multiply<Config::kWidth>(partial, sm90::advance(a, k), sm90::advance(b, k), k > 0);
    sm90::commit_products();
  }
}

// A partial sum into the whole. Its scale is that of its token, or of its row.
template <class Config>
__device__ __forceinline__ void promote(const Place<Config>& me, const float* x_scale, const float* weight_scale,
                                        const float (&partial)[Config::kSums], float (&sums)[Config::kSums]) {
#pragma unroll
  for (int i = 0; i < Config::kSums; i += 4) {
    float scale[4];  // of the accumulators (half, token)
    if constexpr (Config::kInt8) {
      scale[0] = scale[1] = weight_scale[0];
      scale[2] = scale[3] = weight_scale[1];
    } else {
      const float2 s = *reinterpret_cast<const float2*>(x_scale + 2 * i + me.token);
      scale[0] = scale[2] = s.x;
      scale[1] = scale[3] = s.y;
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[i + j] = fmaf(scale[j], partial[i + j], sums[i + j]);
  }
}

// The sums of a tile.
template <class Config>
__device__ __forceinline__ void multiply_tile(const Wide& p, typename Config::Shared& shared,
                                              Position<Config::kStages>& at, const Tile& tile,
                                              float (&sums)[Config::kWhole][Config::kSums]) {
#pragma unroll
  for (auto& whole : sums)
    for (float& sum : whole) sum = 0.0f;
  const Place<Config> me(p, sm90::lane_index());
  RowScales<Config> scales(p, me, tile);
#pragma unroll 1
  for (int k = 0; k < p.k; k += Config::kDepths * kDepth, at.advance()) {
    wait_full(shared.ring, at);
    float partial[Config::kFlights][Config::kSums];
    const auto add = [&](int part) {
      if (!Config::kParts && part && k + kDepth >= p.k) return;  // past the last column
      if (Config::kInt8) scales.advance(Config::kParts ? k : k + part * kDepth);
      const int whole = Config::kParts ? part : 0, depth = Config::kParts ? 0 : part;
      promote(me, shared.scale[at.stage] + depth * Config::kWidth, scales.now + 2 * whole,
              partial[part % Config::kFlights], sums[whole]);
    };
    if constexpr (Config::kFlights == 2) {
      start_part<Config>(shared, at.stage, 0, me, partial[0]);
      start_part<Config>(shared, at.stage, 1, me, partial[1]);
      sm90::wait_products<1>(partial[0]);
      add(0);
      sm90::wait_products<0>(partial[1]);
      add(1);
    } else {
#pragma unroll
      for (int part = 0; part < 2; ++part) {
        start_part<Config>(shared, at.stage, part, me, partial[0]);
        add(part);
      }
    }
    __syncwarp();  // all lanes have read
    if (sm90::lane_index() == 0) sm90::arrive(shared.ring.empty[at.stage]);
  }
  if constexpr (!Config::kInt8) {
    scales.advance(0);
#pragma unroll
    for (int part = 0; part < Config::kWhole; ++part)
#pragma unroll
      for (int i = 0; i < Config::kSums; ++i) sums[part][i] *= scales.now[2 * part + i / 2 % 2];
  }
}

template <class Config>
__device__ __forceinline__ void multiply_tiles(const Wide& p, typename Config::Shared& shared) {
  Position<Config::kStages> at;
  [[maybe_unused]] int turn = 0;
  Tile tile;
  for (auto index = static_cast<int32_t>(blockIdx.x); find<Config>(p, shared.schedule, index, tile);
       index += static_cast<int32_t>(gridDim.x), turn ^= 1) {
    float sums[Config::kWhole][Config::kSums];
    multiply_tile<Config>(p, shared, at, tile, sums);
    find<Config>(p, shared.schedule, sm90::opaque(index), tile);  // again: through the products it would occupy registers
    const Place<Config> me(p, sm90::opaque(sm90::lane_index()));
    const int column = tile.column * Config::block_rows(p);
    uint8_t* buffer = shared.y[4 * me.group + me.warp];
    if constexpr (Config::kGateUp) {
      multiply_gate(p, me, column, sums[0], sums[1]);
      if constexpr (Config::kInt8)
        store_bf16(p, me, tile, column, sums[0], buffer);
      else
        store_e4m3(p, me, tile, column, sums[0], shared.amax[turn]);
    } else {
      const auto store = [&](int part) {
        if constexpr (Config::kFp32)
          store_fp32(p, me, tile, column + part * p.step, sums[part]);
        else
          store_bf16(p, me, tile, column + part * p.step, sums[part], buffer);
      };
      store(0);
      if constexpr (Config::kParts) store(1);
    }
  }
}

template <class Weight, class Output, int kTokens, bool kRowParts>
__global__ void __launch_bounds__(kThreads, 1) wide_kernel(const __grid_constant__ Wide p) {
  using C = Config<Weight, Output, kTokens, kRowParts>;
  auto& shared = sm90::shared_memory<typename C::Shared>();
  fill<kTokens>(shared.schedule, p.offsets, p.rows, p.experts, tiles(p.width, C::block_rows(p)));
  if (threadIdx.x == 0) {
    sm90::prefetch(p.x);
    sm90::prefetch(p.weight);
    shared.ring.init(C::kInt8 ? 1 : 1 + 32, 8);  // who loads; the warps that multiply
    sm90::fence_barrier_init();
    shared.upper = kUpperBytes;
  }
  __syncthreads();
  if (threadIdx.x < 128) {
    sm90::release_registers<24>();
    if (sm90::warp_index() == 0) load<C>(p, shared);
  } else {
    sm90::claim_registers<240>();
    multiply_tiles<C>(p, shared);
  }
}

}  // namespace grok::cuda::gemm::wide
