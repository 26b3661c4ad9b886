// Small kernels for ctypes that use the emulated hardware correctly, or break one of its rules.

#include <map>
#include <string>

#include "cuda/launch.cuh"
#include "guarded.h"

namespace {

using namespace grok::sm90;
using grok::cuda::Element;
using grok::cuda::Launch;
using grok::cuda::Tiles;

struct Memory {
  alignas(1024) uint8_t a[2][64 * 128], b[2][64 * 128];
  alignas(1024) uint8_t y[64 * 128];  // bf16
  float scale[32];
  Barrier full[2], other;
};

// sums = a bᵀ in fp32 and y = sums in bf16, both (64, 64), of e4m3 a (64, K) and b (64, K) with K at most 256: two
// tiles along K, both in flight. The second warpgroup loads, the first multiplies. In a cluster of two, each block
// loads one half of both blocks' tiles.
struct Multiply {
  TensorMap a, b, y;
  float* sums;
  const float* scale;
};

void load(const Multiply& p, Memory& m, bool cluster) {
  for (int i = 0; i < 2; ++i) {
    if (warp_index() == 4 && lane_index() == 0) {
      arrive_expecting(m.full[i], sizeof m.a[i] + sizeof m.b[i]);
      const uint32_t rank = cluster_rank();
      for (uint32_t half = 0; half < 2; ++half) {
        if (cluster && half != rank) continue;
        const auto ranks = static_cast<uint16_t>(cluster ? 3 : 1);
        const int row = static_cast<int>(half) * 32;
        load_tile_to(ranks, m.a[i] + row * 128, p.a, m.full[i], 128 * i, row);
        load_tile_to(ranks, m.b[i] + row * 128, p.b, m.full[i], 128 * i, row);
      }
    }
    if (warp_index() == 5) {
      if (i == 0) copy_4_bytes(&m.scale[lane_index()], p.scale + lane_index(), lane_index() < 20);
      arrive_after_copies(m.full[i]);
    }
  }
  if (warp_index() == 5) wait(m.full[0], 0);  // a thread must not exit while its copies are in flight
}

void multiply_kernel(const Multiply p, bool cluster) {
  Memory& m = shared_memory<Memory>();
  if (threadIdx.x == 0) {
    for (Barrier& full : m.full) init(full, 33, "full");
    fence_barrier_init();
  }
  cluster_sync();
  if (threadIdx.x >= 128) {
    release_registers<24>();
    if (threadIdx.x < 256) load(p, m, cluster);
  } else {
    claim_registers<240>();
    const int warp = warp_index(), lane = lane_index();
    float d[32];
    for (int i = 0; i < 2; ++i) {
      wait(m.full[i], 0);
      fence_products();
      for (uint32_t k = 0; k < 128; k += 32)
        multiply<64>(d, advance(operand(m.a[i]), k), advance(operand(m.b[i]), k), i + k > 0);
      commit_products();
    }
    wait_products<0>();
    for (int i = 0; i < 32; ++i) {
      const int row = 16 * warp + i / 2 % 2 * 8 + lane / 4, column = i / 4 * 8 + lane % 4 * 2 + i % 2;
      d[i] *= m.scale[column % 32];
      p.sums[(64 * cluster_rank() + row) * 64 + column] = d[i];
    }
    for (int j = 0; j < 4; ++j) {  // 16 columns: matrices at (row, column) (0, 0), (8, 0), (0, 8), (8, 8)
      const int row = 16 * warp + lane % 16, chunk = 2 * j + lane / 16;
      store_matrices(m.y + row * 128 + (chunk ^ row % 8) * 16, pack_bf16(d[8 * j], d[8 * j + 1]),
                     pack_bf16(d[8 * j + 2], d[8 * j + 3]), pack_bf16(d[8 * j + 4], d[8 * j + 5]),
                     pack_bf16(d[8 * j + 6], d[8 * j + 7]));
    }
    fence_async();
    named_barrier(1, 128);
    if (threadIdx.x == 0) {
      store_tile(p.y, m.y, 0, static_cast<int>(64 * cluster_rank()));
      commit_stores();
      wait_stores_read<0>();
    }
  }
  cluster_sync();
}

// y (16, 64) = b aᵀ, all bf16: a (64, 64) from registers, b (16, 64) from a tile, and the product, which lies
// transposed in the accumulators, stored by store_transposed.
struct MultiplyRegisters {
  TensorMap b;
  const uint16_t* a;
  uint16_t* y;
};

void multiply_registers_kernel(const MultiplyRegisters p) {
  Memory& m = shared_memory<Memory>();
  if (threadIdx.x == 0) {
    init(m.full[0], 1, "full");
    arrive_expecting(m.full[0], 16 * 128);
    load_tile(m.b[0], p.b, m.full[0], 0, 0);
  }
  __syncthreads();
  wait(m.full[0], 0);
  const int warp = warp_index(), lane = lane_index();
  uint32_t a[4][4];
  for (int step = 0; step < 4; ++step)
    for (int i = 0; i < 4; ++i) {
      const int row = 16 * warp + i % 2 * 8 + lane / 4, column = 16 * step + i / 2 * 8 + lane % 4 * 2;
      a[step][i] = p.a[row * 64 + column] | static_cast<uint32_t>(p.a[row * 64 + column + 1]) << 16;
    }
  float d[8];
  fence_products();
  for (int step = 0; step < 4; ++step) multiply<16>(d, a[step], advance(operand(m.b[0]), 32 * step), step > 0);
  commit_products();
  wait_products<0>();
  uint8_t* tile = m.y + warp * 512;  // matrices at (row of a, row of b) (0, 0), (8, 0), (0, 8), (8, 8)
  store_transposed(tile + lane * 16, pack_bf16(d[0], d[1]), pack_bf16(d[2], d[3]), pack_bf16(d[4], d[5]),
                   pack_bf16(d[6], d[7]));
  __syncwarp();
  const auto* rows = reinterpret_cast<const uint16_t*>(tile) + lane * 8;
  for (int i = 0; i < 8; ++i) p.y[(lane / 16 * 8 + lane % 8) * 64 + 16 * warp + lane / 8 % 2 * 8 + i] = rows[i];
}

// Kernels of one warpgroup that break one rule each

void begin(Memory& m, uint32_t arrivals = 1) {
  if (threadIdx.x == 0) init(m.full[0], arrivals, "full");
  __syncthreads();
}

void waits_in_vain(Memory& m) {
  begin(m);
  wait(m.full[0], 0);
}

void waits_for_bytes(Memory& m) {
  begin(m);
  if (threadIdx.x == 0) arrive_expecting(m.full[0], 64);
  wait(m.full[0], 0);
}

void arrives_too_often(Memory& m) {
  begin(m);
  if (threadIdx.x == 0) {
    arrive_expecting(m.full[0], 64);
    arrive(m.full[0]);
  }
}

void forgets_to_initialise(Memory& m) { arrive(m.other); }

void writes_past_the_end(Memory& m) { reinterpret_cast<volatile uint8_t*>(&m)[sizeof m + threadIdx.x] = 1; }

void writes_far_past_the_end(Memory& m) { reinterpret_cast<volatile uint8_t*>(&m)[1 << 17] = 1; }

void loads_into_another_place(Memory& m) {
  begin(m);
  static uint8_t elsewhere[64 * 128];
  const TensorMap map =
      grok::cuda::tensor_map("check", "any", Tiles{elsewhere, Element::byte, 2, {128, 64}, {0, 128}, {128, 64}});
  if (threadIdx.x == 0) load_tile(elsewhere, map, m.full[0], 0, 0);
}

void misaligned_tile(Memory& m) { (void)operand(m.a[0] + 128); }

void start_product(Memory& m, float (&d)[32]) {
  fence_products();
  multiply<64>(d, operand(m.a[0]), operand(m.b[0]), false);
  commit_products();
}

void multiplies_without_a_fence(Memory& m) {
  float d[32] = {};
  start_product(m, d);
  wait_products<0>();
  multiply<64>(d, operand(m.a[0]), operand(m.b[0]), true);
}

void multiplies_what_is_not_fenced(Memory& m) {
  for (int i = 0; i < 64; i += 4) write_tile(reinterpret_cast<uint32_t*>(m.a[0] + 64 * threadIdx.x + i), 0u);
  if (threadIdx.x != 77) fence_async();
  __syncthreads();
  float d[32];
  start_product(m, d);
  wait_products<0>();
}

void stores_what_is_not_fenced(Memory& m) {
  static uint8_t y[64 * 128];
  const TensorMap map =
      grok::cuda::tensor_map("check", "any", Tiles{y, Element::bf16, 2, {64, 64}, {0, 128}, {64, 64}});
  store_matrices(m.y + 16 * threadIdx.x, 0, 0, 0, 0);
  __syncthreads();
  if (threadIdx.x == 0) store_tile(map, m.y, 0, 0);
}

void reads_while_in_flight(Memory& m) {
  float d[32] = {};
  start_product(m, d);
  if (std::isnan(d[7])) grok::emulation::fail("d is NaN while in flight");
  wait_products<0>();
}

void writes_while_in_flight(Memory& m) {
  float d[32] = {};
  start_product(m, d);
  d[7] = 0.0f;
  wait_products<0>();
}

void ends_with_products(Memory& m) {
  float d[32] = {};
  start_product(m, d);
}

void ends_with_copies(Memory& m) {
  static float zero;
  copy_4_bytes(m.scale, &zero, true);
}

void multiplies_with_one_warp(Memory& m) {
  float d[32] = {};
  if (lane_index() < 16) start_product(m, d);
}

void mixes_operands(Memory& m) {
  float d[32] = {};
  fence_products();
  multiply<64>(d, operand(m.a[warp_index() / 2]), operand(m.b[0]), false);
  commit_products();
  wait_products<0>();
}

void claims_too_much(Memory&) { claim_registers<256>(); }

struct Rule {
  void (*kernel)(Memory&);
  unsigned threads = 128;
};
const std::map<std::string, Rule> rules = {
    {"waits_in_vain", {waits_in_vain}},
    {"waits_for_bytes", {waits_for_bytes}},
    {"arrives_too_often", {arrives_too_often}},
    {"forgets_to_initialise", {forgets_to_initialise}},
    {"writes_past_the_end", {writes_past_the_end}},
    {"writes_far_past_the_end", {writes_far_past_the_end}},
    {"loads_into_another_place", {loads_into_another_place}},
    {"misaligned_tile", {misaligned_tile}},
    {"multiplies_without_a_fence", {multiplies_without_a_fence}},
    {"multiplies_what_is_not_fenced", {multiplies_what_is_not_fenced}},
    {"stores_what_is_not_fenced", {stores_what_is_not_fenced}},
    {"reads_while_in_flight", {reads_while_in_flight}},
    {"writes_while_in_flight", {writes_while_in_flight}},
    {"ends_with_products", {ends_with_products}},
    {"ends_with_copies", {ends_with_copies}},
    {"multiplies_with_one_warp", {multiplies_with_one_warp}},
    {"mixes_operands", {mixes_operands}},
    {"claims_too_much", {claims_too_much, 512}},
};

void rule_kernel(void (*kernel)(Memory&)) { kernel(shared_memory<Memory>()); }

Launch launch(unsigned threads, unsigned cluster) {
  return {"check", "a rule", {cluster, 1, 1}, {threads, 1, 1}, sizeof(Memory), cluster, nullptr};
}

}  // namespace

extern "C" {

int multiply_once(const uint8_t* a, const uint8_t* b, const float* scale, float* sums, uint16_t* y, int64_t rows,
                  int64_t k, int cluster, uint64_t seed, char* error, int size) {
  return guarded(error, size, [&] {
    grok::emulation::options().seed = seed;
    const auto bytes = [&](const uint8_t* data) {
      return grok::cuda::tensor_map("check", "any",
                                    Tiles{data, Element::byte, 2, {uint64_t(k), 64}, {0, uint64_t(k)}, {128, 32}});
    };
    const Multiply p = {
        bytes(a), bytes(b),
        grok::cuda::tensor_map("check", "any", Tiles{y, Element::bf16, 2, {56, uint64_t(rows)}, {0, 128}, {64, 64}}),
        sums, scale};
    grok::cuda::launch_kernel(launch(384, cluster ? 2 : 1), multiply_kernel, p, cluster != 0);
  });
}

int multiply_registers(const uint16_t* a, const uint16_t* b, uint16_t* y, uint64_t seed, char* error, int size) {
  return guarded(error, size, [&] {
    grok::emulation::options().seed = seed;
    const MultiplyRegisters p = {
        grok::cuda::tensor_map("check", "any", Tiles{b, Element::bf16, 2, {64, 16}, {0, 128}, {64, 16}}), a, y};
    grok::cuda::launch_kernel(launch(128, 1), multiply_registers_kernel, p);
  });
}

int break_rule(const char* name, uint64_t seed, char* error, int size) {
  return guarded(error, size, [&] {
    grok::emulation::options().seed = seed;
    const Rule& rule = rules.at(name);
    grok::cuda::launch_kernel(launch(rule.threads, 1), rule_kernel, rule.kernel);
  });
}

uint32_t sum_bf16(uint32_t x, uint32_t y) { return add_bf16(x, y); }
uint32_t permuted(uint32_t low, uint32_t high, uint32_t selector) { return permute_bytes(low, high, selector); }

// Converts one value: bf16 in the upper half of the result, e4m3 in the lower.
uint32_t converted(float x) { return pack_bf16(0.0f, x) | pack_e4m3(x, 0.0f); }
}
