#pragma once

#include <cstdint>

// Every way in which the kernels reach Hopper's hardware, one small function each, with the PTX that it stands for.
// Nothing else in csrc/cuda contains assembly. host_emulation/sm90.h implements the same functions for the host, so that
// the very same kernels run there.
//
// The vocabulary: a tile is a box of a matrix in shared memory, its rows 128 bytes long and swizzled (the 16-byte chunk c
// of row r lies at c ^ (r % 8)), its start aligned to 1024 bytes. A stage is a set of tiles with a barrier that tells when
// they are full and one that tells when they are empty again. A warpgroup is 128 consecutive threads from a multiple of 128.

#ifdef GROK_HOST_EMULATION
#include "host_emulation/sm90.h"
#else

#include <cuda.h>
#include <cuda_runtime.h>

#include "wgmma.cuh"

namespace grok::sm90 {

using TensorMap = CUtensorMap;

// A thread's own address of an object in shared memory, as instructions take it.
__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// The block's dynamic shared memory, as one struct. A kernel asks for sizeof(T) bytes at launch and has no other.
template <class T>
__device__ __forceinline__ T& shared_memory() {
  extern __shared__ __align__(1024) uint8_t raw_shared_memory[];
  return *reinterpret_cast<T*>(raw_shared_memory);
}

// Who am I

__device__ __forceinline__ int lane_index() { return threadIdx.x % 32; }

// The same for all lanes of a warp, and the compiler knows it.
__device__ __forceinline__ int warp_index() { return __shfl_sync(0xffffffffu, threadIdx.x / 32, 0); }

// The same value, which the compiler takes for another: what depends on it is computed here, and not kept in registers.
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

// barrier.cluster: all threads of all blocks of the cluster; what they wrote before is seen after.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// bar.sync: `threads` threads of the block, by number (1..15; 0 is __syncthreads).
__device__ __forceinline__ void named_barrier(int id, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// setmaxnreg: hand registers back, or wait for more. Every warp of the warpgroup calls it.
template <int kRegisters>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void claim_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Barriers in shared memory (mbarrier). A phase completes when `arrivals` arrivals have come and as many bytes as were
// expected. Phases alternate in parity, from 0 on; waiting for the phase before the first returns at once.

struct alignas(8) Barrier {
  uint64_t state;
};

// mbarrier.init. The name is for the emulation's reports.
__device__ __forceinline__ void init(Barrier& barrier, uint32_t arrivals, const char* /*name*/) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(&barrier)), "r"(arrivals) : "memory");
}

// fence.mbarrier_init: one thread has initialised barriers; the copy engine and other blocks of the cluster will see it.
__device__ __forceinline__ void fence_barrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// mbarrier.arrive
__device__ __forceinline__ void arrive(Barrier& barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// mapa, mbarrier.arrive: at the same barrier of another block of the cluster. It tells that this thread has read; ordinary
// writes are not shown to the other block, for which a release at the cluster's scope would be needed, and a fence of all
// memory with it.
__device__ __forceinline__ void arrive_at(Barrier& barrier, uint32_t rank) {
  asm volatile(
      "{\n.reg .b32 remote;\nmapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n}" ::"r"(shared_address(&barrier)),
      "r"(rank)
      : "memory");
}

// mbarrier.arrive.expect_tx: arrive, and let the phase wait for so many bytes more.
__device__ __forceinline__ void arrive_expecting(Barrier& barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(&barrier)), "r"(bytes)
               : "memory");
}

// mbarrier.try_wait.parity, until the phase of this parity is complete. What copies of tiles brought is then seen, and what
// threads of this block wrote before they arrived.
__device__ __forceinline__ void wait(Barrier& barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@!done bra again;\n}" ::"r"(shared_address(&barrier)),
      "r"(parity)
      : "memory");
}

// Copies of tiles (TMA, cp.async.bulk.tensor). Coordinates count elements, the innermost first. One thread calls.

// prefetch.tensormap
__device__ __forceinline__ void prefetch(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// A box into shared memory; its bytes are counted at the barrier. What lies outside the tensor arrives as zeros.
__device__ __forceinline__ void load_tile(void* tile, const TensorMap& map, Barrier& full, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          shared_address(tile)),
      "l"(&map), "r"(shared_address(&full)), "r"(x), "r"(y)
      : "memory");
}

__device__ __forceinline__ void load_tile(void* tile, const TensorMap& map, Barrier& full, int x, int y, int z) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
          shared_address(tile)),
      "l"(&map), "r"(shared_address(&full)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// The same into every block of the cluster whose bit is set in `ranks`: at the same place of its shared memory, counted at
// its own barrier.
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

// A box out of shared memory; what lies outside the tensor is not written. In order: write the tile, fence_async, meet
// the threads that wrote it, store_tile, commit_stores, and wait_stores_read before the tile is written again.
__device__ __forceinline__ void store_tile(const TensorMap& map, const void* tile, int x, int y) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map),
               "r"(shared_address(tile)), "r"(x), "r"(y)
               : "memory");
}

__device__ __forceinline__ void commit_stores() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }

// Until at most kGroups of this thread's groups of stores still read shared memory.
template <int kGroups>
__device__ __forceinline__ void wait_stores_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(kGroups) : "memory");
}

// fence.proxy.async: what this thread wrote to shared memory is seen by copies of tiles and by wgmma.
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

// An ordinary store into a tile. Nothing more than `*to = value`, but the emulation misses a fence_async after it.
template <class T>
__device__ __forceinline__ void write_tile(T* to, T value) {
  *to = value;
}

// Copies of 4 bytes into shared memory (cp.async); a zero where not `valid`, and then `from` is not read.
__device__ __forceinline__ void copy_4_bytes(float* to, const float* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 4 : 0)
               : "memory");
}

// cp.async.mbarrier.arrive.noinc: this thread arrives when all its copies of 4 bytes so far are done.
__device__ __forceinline__ void arrive_after_copies(Barrier& barrier) {
  asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(&barrier)) : "memory");
}

// Products of a warpgroup (wgmma), in wgmma.cuh: multiply<N>(d, a, b, accumulate) for tiles of e4m3, and for a in registers
// and a tile of bf16.

// wgmma.fence: the registers and shared memory that the next products take are written.
__device__ __forceinline__ void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

// Until at most kGroups of this warpgroup's groups of products are in flight.
template <int kGroups>
__device__ __forceinline__ void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kGroups) : "memory");
}

// The same, for the accumulators of products that are then done. To the compiler those are written where the product is
// issued: this keeps it from reading them before the wait.
template <int kGroups, int kCount>
__device__ __forceinline__ void wait_products(float (&d)[kCount]) {
  wait_products<kGroups>();
#pragma unroll
  for (float& sum : d) asm volatile("" : "+f"(sum)::"memory");
}

// What wgmma knows of an operand: a tile whose rows (128 bytes of K) are swizzled. Bits 0..13 the address / 16; 32..45 the
// distance between groups of 8 rows / 16 (1024 bytes); 62..63 the swizzle (1: 128 bytes). A step of K within the row adds
// its bytes / 16.
__device__ __forceinline__ uint64_t operand(const void* tile) {
  return static_cast<uint64_t>((shared_address(tile) & 0x3ffff) >> 4) | (1024ull / 16) << 32 | 1ull << 62;
}
__device__ __forceinline__ uint64_t advance(uint64_t operand, uint32_t bytes) { return operand + bytes / 16; }

// ldmatrix.x4: four 8×8 matrices of 2-byte elements. Lane i gives the address of row i % 8 of matrix i / 8; of each matrix
// the lane gets elements 2 · (lane % 4) and the next, of row lane / 4.
__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(shared_address(row))
               : "memory");
}

// stmatrix.x4: four 8×8 matrices of 2-byte elements. Lane i gives the address of row i % 8 of matrix i / 8; of each matrix
// the lane holds elements 2 · (lane % 4) and the next, of row lane / 4.
__device__ __forceinline__ void store_matrices(void* row, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)), "r"(m0),
               "r"(m1), "r"(m2), "r"(m3)
               : "memory");
}

// The same, but the lane holds column lane / 4 of each matrix, of rows 2 · (lane % 4) and the next.
__device__ __forceinline__ void store_transposed(void* row, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(shared_address(row)),
               "r"(m0), "r"(m1), "r"(m2), "r"(m3)
               : "memory");
}

// prmt: byte i of the result is byte (selector >> 4i) % 8 of the eight of `low` and `high`.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  return __byte_perm(low, high, selector);
}

// add.bf16x2: two sums, to nearest and ties to even.
__device__ __forceinline__ uint32_t add_bf16(uint32_t x, uint32_t y) {
  uint32_t sums;
  asm("add.rn.bf16x2 %0, %1, %2;" : "=r"(sums) : "r"(x), "r"(y));
  return sums;
}

// ex2.approx, rcp.approx: 2ˣ and 1 / x within two units in the last place; what is below 2⁻¹²⁶ counts as 0.
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

// Conversions, to nearest and ties to even; `low` lies in the lower half.

__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t pair;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}

// Beyond ±448 to ±448; a NaN stays one.
__device__ __forceinline__ uint16_t pack_e4m3(float low, float high) {
  uint16_t pair;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(pair) : "f"(high), "f"(low));
  return pair;
}

__device__ __forceinline__ float from_bf16(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

}  // namespace grok::sm90

#endif
