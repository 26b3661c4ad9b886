#pragma once

#include <cstdint>

// Every Hopper instruction that the kernels use, one small function each, named with its PTX. Only this file and
// wgmma.cuh contain assembly. host_emulation/sm90.h implements the same functions for the host, so that the same
// kernels run there.
//
// Terms. A tile is a box of a matrix in shared memory, aligned to 1024 bytes; its rows are 128 bytes long and swizzled
// (the 16-byte chunk c of row r lies at c ^ (r % 8)). A stage is a set of tiles with two barriers: one completes when
// the tiles are full, the other when they are empty again. A warpgroup is 128 consecutive threads, starting at a
// multiple of 128.

#ifdef GROK_HOST_EMULATION
#include "host_emulation/sm90.h"
#else

#include <cuda.h>
#include <cuda_runtime.h>

#include "wgmma.cuh"

namespace grok::sm90 {

using TensorMap = CUtensorMap;

// The address of an object within the block's shared memory, as instructions take it.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The block's dynamic shared memory as one struct. A kernel is launched with sizeof(T) bytes and has no other.
template <class T>
__device__ __forceinline__ T& shared_memory() {
  extern __shared__ __align__(1024) uint8_t raw_shared_memory[];
  return *reinterpret_cast<T*>(raw_shared_memory);
}

// Identity

__device__ __forceinline__ int lane_index() { return threadIdx.x % 32; }

// The shuffle tells the compiler that all lanes of a warp have the same value.
__device__ __forceinline__ int warp_index() { return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0); }

// The same value, hidden from the optimiser: what depends on it is computed here rather than early and kept in
// registers.
__device__ __forceinline__ int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}

// elect.sync: true in one lane of the warp.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.u32 %0, 1, 0, p;\n}" : "=r"(elected));
  return elected != 0;
}

// %cluster_ctarank: which block of its cluster this is.
__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// barrier.cluster: a barrier of all threads of the cluster, with release and acquire.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// bar.sync: a barrier of `threads` threads of the block; ids 1..15 (0 is __syncthreads).
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// setmaxnreg: give registers back, or wait for more. Called by every warp of the warpgroup.
template <int kRegisters>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Barriers in shared memory (mbarrier). A phase completes after `arrivals` arrivals and all expected bytes. The parity
// of phases alternates, starting at 0; waiting for the phase before the first (parity 1) returns at once.

struct alignas(8) Barrier {
  uint64_t state;
};

// mbarrier.init. The emulation uses the name in its reports.
__device__ __forceinline__ void init(Barrier& barrier, uint32_t arrivals, const char* /*name*/) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}

// fence.mbarrier_init: makes initialised barriers visible to the copy engine and to other blocks of the cluster.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// mbarrier.arrive
__device__ __forceinline__ void arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// mapa, mbarrier.arrive: arrives at the same barrier of another block of the cluster, to say that this thread has read.
// It does not publish ordinary writes to that block: a release at cluster scope would, but costs a fence of all memory.
__device__ __forceinline__ void arrive_at(Barrier& barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(&barrier)),
      "r"(rank)
      : "memory");
}

// mbarrier.arrive.expect_tx: arrives, and makes the phase wait for so many more bytes.
__device__ __forceinline__ void arrive_expecting(Barrier& barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}

// mbarrier.try_wait.parity: waits until the phase of this parity is complete. What TMA copied is then visible, and what
// threads of this block wrote before they arrived.
__device__ __forceinline__ void wait(Barrier& barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

// Copies of tiles by the copy engine (TMA, cp.async.bulk.tensor). Coordinates are elements, innermost first. Called by
// one thread.

// prefetch.tensormap
__device__ __forceinline__ void prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Loads a box into shared memory and counts its bytes at the barrier. Outside the tensor it reads zeros.
__device__ __forceinline__ void load_tile(void* tile, const TensorMap& map, Barrier& full, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(tile)),
      "l"(&map), "r"(shared_address(&full)), "r"(x), "r"(y)
      : "memory");
}

__device__ __forceinline__ void load_tile(void* tile, const TensorMap& map, Barrier& full, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes"
      " [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(shared_address(tile)),
      "l"(&map), "r"(shared_address(&full)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// Multicast: loads the box into every block of the cluster whose bit is set in `ranks`, at the same place in its shared
// memory, and counts the bytes at that block's own barrier.
__device__ __forceinline__ void load_tile_to(uint16_t ranks, void* tile, const TensorMap& map, Barrier& full, int x,
                                             int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%4, %5}], [%2], %3;" ::"r"(shared_address(tile)),
      "l"(&map), "r"(shared_address(&full)), "h"(ranks), "r"(x), "r"(y)
      : "memory");
}

__device__ __forceinline__ void load_tile_to(uint16_t ranks, void* tile, const TensorMap& map, Barrier& full, int x,
                                             int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster"
      " [%0], [%1, {%4, %5, %6}], [%2], %3;" ::"r"(shared_address(tile)),
      "l"(&map), "r"(shared_address(&full)), "h"(ranks), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// Stores a box from shared memory; nothing is written outside the tensor. In order: write the tile, fence_async, a
// barrier of the threads that wrote it, store_tile, commit_stores, and wait_stores_read before the tile is written
// again.
__device__ __forceinline__ void store_tile(const TensorMap& map, const void* tile, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
               "r"(shared_address(tile)), "r"(x), "r"(y)
               : "memory");
}

__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Waits until at most kGroups of this thread's groups of stores are still reading shared memory.
template <int kGroups>
__device__ __forceinline__ void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kGroups) : "memory");
}

// fence.proxy.async: makes this thread's writes to shared memory visible to TMA and wgmma.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// An ordinary store into a tile, `*to = value`. The emulation reports a missing fence_async after it.
template <class T>
__device__ __forceinline__ void write_tile(T* to, T value) {
  *to = value;
}

// cp.async: copies 4 bytes into shared memory. If not `valid`, writes zeros and does not read `from`.
__device__ __forceinline__ void copy_4_bytes(float* to, const float* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 4 : 0)
               : "memory");
}

// cp.async.mbarrier.arrive.noinc: this thread arrives once all its copies of 4 bytes so far are done.
__device__ __forceinline__ void arrive_after_copies(Barrier& barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// Products of a warpgroup (wgmma) are in wgmma.cuh: multiply<N>(d, a, b, accumulate) with a as a tile of e4m3 or in
// registers (bf16), and multiply_e4m3 with a in registers.

// wgmma.fence: orders earlier writes to the registers of the next products before them.
__device__ __forceinline__ void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Waits until at most kGroups of this warpgroup's groups of products are in flight.
template <int kGroups>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// The same, for the accumulators d of products that are then complete. To the compiler, a product writes its
// accumulators where it is issued; this keeps it from reading them before the wait.
template <int kGroups, int kCount>
__device__ __forceinline__ void wait_products(float (&d)[kCount]) {
  wait_products<kGroups>();
#pragma unroll
  for (float& sum : d) asm volatile("" : "+f"(sum)::"memory");
}

// wgmma's descriptor of an operand in shared memory, a tile with swizzled rows of 128 bytes of K. Bits 0..13: address /
// 16; 32..45: distance between groups of 8 rows / 16 (1024 bytes); 62..63: swizzle (1: 128 bytes). A step along K
// within the row adds its bytes / 16.
__device__ __forceinline__ uint64_t operand(const void* tile) {
  return static_cast<uint64_t>((shared_address(tile) & 0x3ffff) >> 4) | (1024ull / 16) << 32 | 1ull << 62;
}
__device__ __forceinline__ uint64_t advance(uint64_t operand, uint32_t bytes) { return operand + bytes / 16; }

// ldmatrix.x4: four 8×8 matrices of 2-byte elements. Lane i passes the address of row i % 8 of matrix i / 8, and gets
// from each matrix elements 2 · (i % 4) and 2 · (i % 4) + 1 of row i / 4.
__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}

// stmatrix.x4: four 8×8 matrices of 2-byte elements. Lane i passes the address of row i % 8 of matrix i / 8, and holds
// of each matrix elements 2 · (i % 4) and 2 · (i % 4) + 1 of row i / 4.
__device__ __forceinline__ void store_matrices(void* row, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(m0),
               "r"(m1), "r"(m2), "r"(m3)
               : "memory");
}

// The same, transposed: lane i holds of each matrix column i / 4 of rows 2 · (i % 4) and 2 · (i % 4) + 1.
__device__ __forceinline__ void store_transposed(void* row, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(m0), "r"(m1), "r"(m2), "r"(m3)
               : "memory");
}

// prmt: byte i of the result is byte (selector >> 4i) % 8 of the eight bytes of `low`, then `high`.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

// add.bf16x2: two sums, rounded to nearest even.
__device__ __forceinline__ uint32_t add_bf16(uint32_t x, uint32_t y) {
  uint32_t sums;
  asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(sums) : "r"(x), "r"(y));
  return sums;
}

// ex2.approx, rcp.approx: 2ˣ and 1 / x within 2 ulp; subnormals count as 0.
__device__ __forceinline__ float power_of_two(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Conversions, rounded to nearest even; `low` goes into the lower half.

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Saturates at ±448; NaN stays NaN.
__device__ __forceinline__ uint16_t pack_e4m3(float low, float high) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ float from_bf16(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

}  // namespace grok::sm90

#endif
