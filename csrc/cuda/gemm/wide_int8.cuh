#pragma once

#include <cstdint>

#include "../sm90.cuh"
#include "wide_tile.cuh"

// int8 on its way to the tensor core: bytes of a tile, exactly in bf16, as an operand in registers.

namespace grok::cuda::gemm::wide {

// Two numbers of int8 as bf16: with seven bits 128 + x % 128 is exact, the sign chooses between -128 and -256, and so is
// the sum of both.
__device__ __forceinline__ uint32_t to_bf16(uint32_t low_bits, uint32_t signs, uint32_t selector, UpperBytes upper) {
  return sm90::add_bf16(sm90::permute_bytes(low_bits, upper.plus, selector),
                        sm90::permute_bytes(signs, upper.minus, selector));
}

// Four neighbours, to the operand's registers of columns 2t and 2t + 1, and of 2t + 8 and 2t + 9.
__device__ __forceinline__ void convert(uint32_t bytes, UpperBytes upper, uint32_t& left, uint32_t& right) {
  const uint32_t low_bits = bytes & 0x7f7f7f7fu, signs = bytes & 0x80808080u;
  left = to_bf16(low_bits, signs, 0x4140, upper);
  right = to_bf16(low_bits, signs, 0x4342, upper);
}

// The thread's operands of 4 steps of 16 columns, the first or the second half of a tile's 128 bytes, from its rows. Of
// the 128 it has 32t to 32t + 31; neighbouring rows, whose chunks the swizzle moves by one, meet no bank twice.
template <class Config>
__device__ __forceinline__ void load_operands(const uint8_t* tile, int half, UpperBytes upper,
                                              const Place<Config>& me, uint32_t (&a)[4][4]) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (Config::kShort && h) {
#pragma unroll
      for (int step = 0; step < 4; ++step) a[step][1] = a[step][3] = 0;
      continue;
    }
    const uint4 bytes = *reinterpret_cast<const uint4*>(tile + in_tile(me.weight_row(h), 16 * me.token + 16 * half));
    const uint32_t words[4] = {bytes.x, bytes.y, bytes.z, bytes.w};
#pragma unroll
    for (int step = 0; step < 4; ++step) convert(words[step], upper, a[step][h], a[step][2 + h]);
  }
}

}  // namespace grok::cuda::gemm::wide
