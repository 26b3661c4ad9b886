#pragma once

#include <cstdint>

#include "../include/grok/swapped.h"
#include "product.cuh"
#include "quantize.cuh"
#include "schedule.cuh"

// The row-wise kernels before and after the products of the expert layer. All are bound by memory bandwidth.

namespace grok::cuda::gemm {

constexpr int kRowThreads = 256, kRowWarps = kRowThreads / 32;

// In 32 bits: a 64-bit division would be half of a kernel's instructions.
__device__ __forceinline__ int64_t token_of(const int32_t* order, int64_t row, int64_t active) {
  return static_cast<uint32_t>(order[row]) / static_cast<uint32_t>(active);
}

// A warp takes 256 columns of a row, eight per lane: 16-byte loads need few instructions. The 16 lanes of half a warp
// hold the 128 columns of one scale.
__global__ void __launch_bounds__(kRowThreads) gather_quantize_kernel(const GatherQuantize p) {
  const int64_t row = blockIdx.x;
  const int column = static_cast<int>(8 * (blockIdx.y * kRowThreads + threadIdx.x));
  if (row >= p.offsets[p.experts] || column / 256 * 256 >= p.dim) return;
  const uint16_t* x = p.x + token_of(p.order, row, p.active) * p.x_stride + column;
  const uint4 bits = column < p.dim ? *reinterpret_cast<const uint4*>(x) : make_uint4(0, 0, 0, 0);
  const uint32_t words[4] = {bits.x, bits.y, bits.z, bits.w};
  float values[8];
  uint32_t amax = 0;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    values[i] = __uint_as_float(i % 2 ? words[i / 2] & 0xffff0000u : words[i / 2] << 16);
    amax = max(amax, magnitude(values[i]));
  }
#pragma unroll
  for (int bit = 8; bit; bit /= 2) amax = max(amax, __shfl_xor_sync(0xffffffffu, amax, bit));
  if (column >= p.dim) return;
  const Divisor scale = scale_of(amax);
  if (sm90::lane_index() % 16 == 0) p.scale[row * p.scale_row + column / kGroup * p.scale_group] = scale.value;
  uint32_t q[2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
    q[i] = quantize(values[4 * i], values[4 * i + 1], scale) |
           static_cast<uint32_t>(quantize(values[4 * i + 2], values[4 * i + 3], scale)) << 16;
  *reinterpret_cast<uint2*>(p.q + row * p.dim + column) = make_uint2(q[0], q[1]);
}

// A warp takes 128 columns of a row. A lane writes four neighbouring places, which are two pairs of neighbours in x.
__global__ void __launch_bounds__(kRowThreads) gather_rows_kernel(const GatherRows p) {
  const int64_t row = blockIdx.x, group = int64_t{blockIdx.y} * kRowWarps + sm90::warp_index();
  if (128 * group >= p.dim || (p.order && row >= p.offsets[p.experts])) return;
  const uint16_t* x = p.x + (p.order ? token_of(p.order, row, p.active) : row) * p.x_stride;
  const int64_t width = int64_t{tiles(p.dim, 128)} * 128;
  const int place = 4 * sm90::lane_index();
  uint32_t pairs[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int64_t column = 128 * group + column_at(place + 2 * i);
    pairs[i] = column < p.dim ? *reinterpret_cast<const uint32_t*>(x + column) : 0;
  }
  *reinterpret_cast<uint2*>(p.y + row * width + 128 * group + place) = make_uint2(pairs[0], pairs[1]);
}

__global__ void __launch_bounds__(kRowThreads) combine_kernel(const Combine p) {
  const int64_t token = blockIdx.x, column = 4 * (int64_t{blockIdx.y} * kRowThreads + threadIdx.x);
  if (column >= p.dim) return;
  const float* parts = p.parts + token * p.active * p.dim + column;
  float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  for (int64_t a = 0; a < p.active; ++a) {
    const float4 part = *reinterpret_cast<const float4*>(parts + a * p.dim);
    sum = make_float4(sum.x + part.x, sum.y + part.y, sum.z + part.z, sum.w + part.w);
  }
  *reinterpret_cast<uint2*>(p.y + token * p.dim + column) =
      make_uint2(sm90::pack_bf16(sum.x, sum.y), sm90::pack_bf16(sum.z, sum.w));
}

}  // namespace grok::cuda::gemm
