#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <string>

#include "machine.h"

// The parts of the CUDA language that kernels use, for g++. Included before a kernel's source.

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __noinline__
#define __constant__ static
#define __grid_constant__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(16) int4 {
  int x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline int4 make_int4(int x, int y, int z, int w) { return {x, y, z, w}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

extern uint3 threadIdx, blockIdx;  // of the running fiber
extern dim3 blockDim, gridDim;

using cudaStream_t = struct CUstream_st*;

// Barriers, and exchanges between the lanes of a warp

inline void __syncthreads() {
  namespace emu = grok::emulation;
  emu::Block& block = *emu::self().block;
  emu::meet(block.named[0], static_cast<uint32_t>(block.threads.size()), "__syncthreads", "__syncthreads");
}

inline void __syncwarp(unsigned mask = 0xffffffffu) {
  grok::emulation::exchange(mask, 0, "__syncwarp", [](const uint64_t*) { return uint64_t{0}; });
}

namespace grok::emulation {

// Publishes the lane's value to the warp and returns that of lane `source`.
template <class T>
T shuffle(unsigned mask, T value, int source, const char* operation) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "a shuffle moves 4 or 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  if (!(mask >> source & 1))
    fail(std::string(operation) + ": reads lane " + std::to_string(source) + ", not in its mask");
  const uint64_t got = exchange(mask, bits, operation, [source](const uint64_t* slot) { return slot[source]; });
  std::memcpy(&value, &got, sizeof value);
  return value;
}

inline int lane() { return static_cast<int>(self().lane()); }

}  // namespace grok::emulation

template <class T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = grok::emulation::lane();
  return grok::emulation::shuffle(mask, value, lane / width * width + source % width, "__shfl_sync");
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = grok::emulation::lane(), source = lane ^ bits;
  return grok::emulation::shuffle(mask, value, source / width > lane / width ? lane : source, "__shfl_xor_sync");
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, int delta, int width = 32) {
  const int lane = grok::emulation::lane();
  return grok::emulation::shuffle(mask, value, lane % width < delta ? lane : lane - delta, "__shfl_up_sync");
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int delta, int width = 32) {
  const int lane = grok::emulation::lane();
  return grok::emulation::shuffle(mask, value, lane % width + delta >= width ? lane : lane + delta, "__shfl_down_sync");
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  const auto votes_of = [mask](const uint64_t* slot) {
    uint64_t votes = 0;
    for (int lane = 0; lane < 32; ++lane)
      if (mask >> lane & 1) votes |= slot[lane] << lane;
    return votes;
  };
  return static_cast<unsigned>(grok::emulation::exchange(mask, predicate != 0, "__ballot_sync", votes_of));
}

inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) == mask; }
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }

// Memory. Fibers switch only where they wait, so plain accesses are atomic.

template <class T>
T __ldg(const T* pointer) {
  return *pointer;
}
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T atomicAdd(T* address, T value) {
  const T old = *address;
  *address = old + value;
  return old;
}
template <class T>
T atomicMax(T* address, T value) {
  const T old = *address;
  *address = old < value ? value : old;
  return old;
}
template <class T>
T atomicExch(T* address, T value) {
  const T old = *address;
  *address = value;
  return old;
}
template <class T>
T atomicCAS(T* address, T expected, T value) {
  const T old = *address;
  if (old == expected) *address = value;
  return old;
}

// Arithmetic

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(static_cast<unsigned>(x)) : 32; }
inline unsigned __float_as_uint(float x) {
  unsigned bits;
  std::memcpy(&bits, &x, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float x;
  std::memcpy(&x, &bits, sizeof x);
  return x;
}
inline float __fdividef(float x, float y) { return x / y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __expf(float x) { return std::exp(x); }
using std::fabs, std::fmaf, std::fmaxf, std::fminf, std::exp, std::tanh;

template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
