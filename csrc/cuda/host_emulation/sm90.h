#pragma once

#include <cstdint>

#include "builtins.h"
#include "machine.h"

// sm90.cuh for the emulation: the same functions on the host. README.md says what they do not model.

namespace grok::emulation {

void note_tile_write(const void* to, uint32_t bytes);  // records an ordinary store, which needs a fence_async

}  // namespace grok::emulation

namespace grok::sm90 {

namespace emu = grok::emulation;

struct TensorMap {
  std::byte* data;
  uint32_t element_bytes;
  int rank;
  int64_t size[3], stride[3];  // elements; bytes
  uint32_t box[3];
  uint32_t bytes() const { return element_bytes * box[0] * box[1] * box[2]; }
};

struct alignas(8) Barrier {
  uint64_t state;
};

template <class T>
T& shared_memory() {
  const emu::Block& block = *emu::self().block;
  if (block.shared_bytes != sizeof(T))
    emu::fail("shared memory of " + std::to_string(sizeof(T)) + " bytes, launched with " +
              std::to_string(block.shared_bytes));
  return *reinterpret_cast<T*>(block.shared);
}

// Identity

inline int lane_index() { return static_cast<int>(emu::self().lane()); }
inline int warp_index() { return static_cast<int>(emu::self().warp()); }
inline int opaque(int value) { return value; }
inline bool elect_one() {
  __syncwarp();  // elect.sync synchronises the warp
  return lane_index() == 0;
}
inline uint32_t cluster_rank() { return emu::self().block->rank; }
void cluster_sync();
void named_barrier(int id, int threads);
void resize_registers(const char* operation, int registers);  // checks, and synchronises the warpgroup
template <int kRegisters>
void release_registers() {
  resize_registers("setmaxnreg.dec", kRegisters);
}
template <int kRegisters>
void claim_registers() {
  resize_registers("setmaxnreg.inc", kRegisters);
}

// Barriers

void init(Barrier& barrier, uint32_t arrivals, const char* name);
inline void fence_barrier_init() {}
void arrive(Barrier& barrier);
void arrive_at(Barrier& barrier, uint32_t rank);
void arrive_expecting(Barrier& barrier, uint32_t bytes);
void wait(Barrier& barrier, uint32_t parity);

// Copies

inline void prefetch(const TensorMap&) {}
void load_tile_to(uint16_t ranks, void* tile, const TensorMap& map, Barrier& full, int x, int y, int z);
inline void load_tile_to(uint16_t ranks, void* tile, const TensorMap& map, Barrier& full, int x, int y) {
  load_tile_to(ranks, tile, map, full, x, y, 0);
}
inline void load_tile(void* tile, const TensorMap& map, Barrier& full, int x, int y, int z = 0) {
  load_tile_to(static_cast<uint16_t>(1u << cluster_rank()), tile, map, full, x, y, z);
}
void store_tile(const TensorMap& map, const void* tile, int x, int y);
void commit_stores();
void wait_store_groups(size_t groups);
template <int kGroups>
void wait_stores_read() {
  wait_store_groups(kGroups);
}
void fence_async();
template <class T>
void write_tile(T* to, T value) {
  emu::note_tile_write(to, sizeof value);
  *to = value;
}
void copy_4_bytes(float* to, const float* from, bool valid);
void arrive_after_copies(Barrier& barrier);

// Products

uint64_t operand(const void* tile);
inline uint64_t advance(uint64_t operand, uint32_t bytes) { return operand + bytes / 16; }
void fence_products();
void multiply_e4m3(float* d, int n, uint64_t a, uint64_t b, bool accumulate);
template <int kN>
void multiply(float (&d)[kN / 2], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(kN % 8 == 0 && kN >= 8 && kN <= 256, "wgmma has widths of 8 to 256");
  multiply_e4m3(d, kN, a, b, accumulate);
}
void multiply_bf16(float* d, int n, const uint32_t* a, uint64_t b, bool accumulate);
template <int kN>
void multiply(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(kN % 8 == 0 && kN >= 8 && kN <= 256, "wgmma has widths of 8 to 256");
  multiply_bf16(d, kN, a, b, accumulate);
}
void multiply_e4m3_from_registers(float* d, int n, const uint32_t* a, uint64_t b, bool accumulate);
template <int kN>
void multiply_e4m3(float (&d)[kN / 2], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  multiply_e4m3_from_registers(d, kN, a, b, accumulate);
}
void commit_products();
void wait_product_groups(size_t groups);
template <int kGroups>
void wait_products() {
  wait_product_groups(kGroups);
}
template <int kGroups, int kCount>
void wait_products(float (&)[kCount]) {
  wait_product_groups(kGroups);
}
void load_matrices(uint32_t (&m)[4], const void* row);
void store_matrices(void* row, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3);
void store_transposed(void* row, uint32_t m0, uint32_t m1, uint32_t m2, uint32_t m3);

inline float power_of_two(float x) { return std::exp2(x); }
inline float reciprocal(float x) { return 1.0f / x; }

// Conversions

uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector);
uint32_t add_bf16(uint32_t x, uint32_t y);

uint32_t pack_bf16(float low, float high);
uint16_t pack_e4m3(float low, float high);
inline float from_bf16(uint16_t bits) { return __uint_as_float(static_cast<uint32_t>(bits) << 16); }

}  // namespace grok::sm90
