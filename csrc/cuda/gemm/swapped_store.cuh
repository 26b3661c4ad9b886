#pragma once

#include <cstdint>

#include "activation.cuh"
#include "product.cuh"
#include "quantize.cuh"
#include "schedule.cuh"

// The epilogue of swapped.cuh. With swapped operands a row of y lies across threads: eight neighbours in lanes 4 apart.

namespace grok::cuda::gemm::swapped {

struct Swapped : Parameters {
  int32_t groups, span;  // int8: groups of K with a scale of their own, and columns of each
  int32_t height;        // Even: weight rows of a warpgroup
  bool y_is_float;
};

// The accumulators of a thread in a multiplying warpgroup: 4j + 2h + i is column `output(h)` of the block's columns of
// y, and token 8j + `token` + i of the tile.
template <class Config>
struct Place {
  int group, warp, row, token, height;

  __device__ __forceinline__ Place(const Swapped& p, int lane)
      : group(sm90::warp_index() / 4 - 1),
        warp(sm90::warp_index() % 4),
        row(lane / 4),
        token(lane % 4 * 2),
        height(Config::kEven ? p.height : 64) {}

  // The first of the 8 rows of one half of the warp, counted within the warpgroup.
  __device__ __forceinline__ int first(int h) const { return Config::kShort ? 8 * warp : 16 * warp + 8 * h; }
  __device__ __forceinline__ bool has(int h) const {
    return !Config::kEven || (first(h) < height && !(Config::kShort && h));
  }
  __device__ __forceinline__ int output(int h) const { return group * height + first(h) + row; }
  // The weight row that gives this column. With int8, gate_up's y is the next product's x, in `gather_rows` order.
  __device__ __forceinline__ int weight_row(int h) const {
    return Config::kInt8 && Config::kGated ? column_at(output(h)) : output(h);
  }
};

template <class Config>
__device__ __forceinline__ void store_fp32(const Swapped& p, const Place<Config>& me, const Tile& tile, int column,
                                           const float (&sums)[Config::kSums]) {
#pragma unroll
  for (int i = 0; i < Config::kSums; i += 4) {
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const int row = tile.row + 2 * i + me.token + pair;
      if (row >= tile.end) continue;
      const int32_t to = p.order ? p.order[row] : row;
      const float weight = p.order ? p.row_weights[to] : 1.0f;
      float* y = static_cast<float*>(p.y) + static_cast<int64_t>(to) * p.width;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int at = column + me.output(h);
        if (me.has(h) && at < p.width) y[at] = weight * sums[i + 2 * h + pair];
      }
    }
  }
}

// Transposes 16 tokens at a time through the warp's staging buffer: four 8 × 8 matrices, at (token, column) (0, 0), (0,
// 8), (8, 0), (8, 8). Two lanes then hold 16 neighbouring columns of y, a whole sector of memory.
template <class Config>
__device__ __forceinline__ void store_bf16(const Swapped& p, const Place<Config>& me, const Tile& tile, int column,
                                           const float (&sums)[Config::kSums], uint8_t* buffer) {
  const int lane = sm90::lane_index(), h = lane % 2, token = lane / 16 * 8 + lane / 2 % 8;
  const int at = column + me.output(h) - me.row;
  const bool there = me.has(h) && at < p.width;
#pragma unroll
  for (int i = 0; i < Config::kSums; i += 8) {
    const float* v = sums + i;
    sm90::store_transposed(buffer + 16 * lane, sm90::pack_bf16(v[0], v[1]), sm90::pack_bf16(v[2], v[3]),
                           sm90::pack_bf16(v[4], v[5]), sm90::pack_bf16(v[6], v[7]));
    __syncwarp();
    const int row = tile.row + 2 * i + token;
    if (there && row < tile.end)
      *reinterpret_cast<uint4*>(static_cast<uint16_t*>(p.y) + static_cast<int64_t>(row) * p.width + at) =
          *reinterpret_cast<const uint4*>(buffer + 128 * (token / 8 * 2 + h) + 16 * (token % 8));
    __syncwarp();
  }
}

// gate = act(gate) · up, and 0 past the last column.
template <class Config>
__device__ __forceinline__ void multiply_gate(const Swapped& p, const Place<Config>& me, int column,
                                              float (&gate)[Config::kSums], const float (&up)[Config::kSums]) {
  apply_gate<Config::kSums>(p.activation, gate, up);
#pragma unroll
  for (int i = 0; i < Config::kSums; ++i)
    if (column + me.weight_row(i / 2 % 2) >= p.n / 2) gate[i] = 0.0f;
}

// Stores e4m3, with one scale for a token and the 128 columns of the two warpgroups.
template <class Config>
__device__ __forceinline__ void store_e4m3(const Swapped& p, const Place<Config>& me, const Tile& tile, int column,
                                           const float (&v)[Config::kSums], uint32_t (&amax)[Config::kTokens][8]) {
#pragma unroll
  for (int i = 0; i < Config::kSums; i += 4)
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      uint32_t largest = max(magnitude(v[i + pair]), magnitude(v[i + 2 + pair]));
#pragma unroll
      for (int lanes = 4; lanes < 32; lanes *= 2) largest = max(largest, __shfl_xor_sync(0xffffffffu, largest, lanes));
      if (me.row == 0) amax[2 * i + me.token + pair][4 * me.group + me.warp] = largest;
    }
  sm90::named_barrier(1, 256);
#pragma unroll
  for (int i = 0; i < Config::kSums; i += 4)
#pragma unroll
    for (int pair = 0; pair < 2; ++pair) {
      const int token = 2 * i + me.token + pair, row = tile.row + token;
      if (row >= tile.end) continue;
      uint32_t largest = 0;
#pragma unroll
      for (int warp = 0; warp < 8; ++warp) largest = max(largest, amax[token][warp]);
      const Divisor scale = scale_of(largest);
      if (me.output(0) == 0) p.y_scale[row * p.y_scale_row + column / kGroup * p.y_scale_group] = scale.value;
      const uint16_t both = quantize(v[i + pair], v[i + 2 + pair], scale);
      uint8_t* y = static_cast<uint8_t*>(p.y) + static_cast<int64_t>(row) * p.width;
#pragma unroll
      for (int h = 0; h < 2; ++h)
        if (column + me.output(h) < p.width) y[column + me.output(h)] = static_cast<uint8_t>(both >> 8 * h);
    }
}

}  // namespace grok::cuda::gemm::swapped
