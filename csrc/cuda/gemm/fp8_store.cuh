#pragma once

#include "activation.cuh"
#include "product.cuh"
#include "quantize.cuh"
#include "schedule.cuh"

// The epilogue of fp8.cuh. A warpgroup whose 64 rows all belong to the expert stores them by TMA; otherwise each thread
// stores its own values, and none past the expert's last row.

namespace grok::cuda::gemm {

constexpr int kTileBytes = 64 * 128;  // a staging tile: 64 rows of 128 bytes

struct Fp8 : Parameters {
  sm90::TensorMap y_tiles;  // of y, unless y is fp32
};

// The accumulators of a thread in a multiplying warpgroup: rows `row` and `row` + 8 of the tile, columns 8i + `pair`
// and 8i + `pair` + 1.
struct Place {
  int group, warp, row, pair;
  __device__ __forceinline__ Place()
      : group(sm90::warp_index() / 4 - 1),
        warp(sm90::warp_index() % 4),
        row(64 * group + 16 * warp + sm90::lane_index() / 4),
        pair(sm90::lane_index() % 4 * 2) {}
};

// Multiplies the thread's sums by the scales of the weights, from `column` on; columns from `last` on have none.
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

// Call before a warpgroup fills a staging tile again: waits until the store before the last has read that tile.
__device__ __forceinline__ void reuse_buffer(const Place& me) {
  if (threadIdx.x % 128 == 0) sm90::wait_stores_read<1>();
  sm90::named_barrier(1 + me.group, 128);
}

__device__ __forceinline__ void store_buffer(const Fp8& p, const Place& me, const uint8_t* tile, int column, int row) {
  sm90::fence_async();
  sm90::named_barrier(1 + me.group, 128);
  if (threadIdx.x % 128 == 0) {
    sm90::store_tile(p.y_tiles, tile, column, row);
    sm90::commit_stores();
  }
}

template <int kCount, class Buffers>
__device__ __forceinline__ void store_bf16(const Fp8& p, const Place& me, const Tile& tile, int column,
                                           const float (&sums)[kCount], Buffers& buffers, int& next) {
  if (tile.row + 64 * me.group + 64 <= tile.end) {
    // opaque: otherwise the compiler computes the addresses early and keeps them in registers during the products
    const int lane = sm90::opaque(sm90::lane_index()), row = 16 * me.warp + lane % 16;
#pragma unroll
    for (int c = 0; c < 2 * kCount; c += 64, next ^= 1) {
      if (column + c >= p.width) break;
      reuse_buffer(me);
      uint8_t* buffer = buffers[next];
#pragma unroll
      for (int j = 0; j < 64; j += 16) {  // 16 columns: four 8 × 8 matrices
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
    uint16_t* y = static_cast<uint16_t*>(p.y) + static_cast<int64_t>(row) * p.width;
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
    float* y = static_cast<float*>(p.y) + static_cast<int64_t>(to) * p.width;
#pragma unroll
    for (int i = 0; i < kCount; i += 4) {
      const int at = column + 2 * i + me.pair;
      if (at < p.width)
        *reinterpret_cast<float2*>(y + at) = make_float2(weight * sums[i + 2 * h], weight * sums[i + 2 * h + 1]);
    }
  }
}

// Stores act(gate) · up in e4m3 with a scale per row; a thread has 32 columns of 2 rows.
template <class Buffers>
__device__ __forceinline__ void store_gate_up(const Fp8& p, const Place& me, const Tile& tile, int column,
                                              float (&sums)[128], Buffers& buffers, int& next) {
  if (column >= p.width) return;  // N may have an odd number of tiles; then the last pair's second block has none
  apply_gate<64>(p.activation, sums, sums + 64);
  uint32_t amax[2] = {};
  if (column + 128 > p.width) {
#pragma unroll
    for (int i = 0; i < 64; ++i)
      if (column + i / 4 * 8 + me.pair >= p.width) sums[i] = 0.0f;
  }
#pragma unroll
  for (int i = 0; i < 64; ++i) amax[i / 2 % 2] = max(amax[i / 2 % 2], magnitude(sums[i]));
#pragma unroll
  for (uint32_t& largest : amax) {  // the four lanes that share the row
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
    const int row = sm90::opaque(me.row % 64);
#pragma unroll
    for (int i = 0; i < 64; i += 8) {  // 16 columns: one swizzled chunk of each row
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
      *reinterpret_cast<uint16_t*>(static_cast<uint8_t*>(p.y) + static_cast<int64_t>(row) * p.width + at) =
          quantize(sums[i], sums[i + 1], scale[i / 2 % 2]);
  }
}

}  // namespace grok::cuda::gemm
