#pragma once

#include <cstdint>
#include <type_traits>

#include "pipeline.cuh"
#include "swapped_store.cuh"

// Products with the weights on the side of 64 rows: e4m3 × e4m3 for few rows, where nothing but the bytes of the weights
// should cost time, and int8 × bf16 for any number.
//
// One thread keeps the tiles of as many stages under way as shared memory holds. Two warpgroups multiply other rows of
// the weights with the same rows of x; of every 128 columns of K, a chain of products into a partial sum, and that, times
// the scale of the row of x (e4m3) or of the weights and their group of K (int8), into fp32. Nobody waits for more than
// its own part, and int8 is converted while the part before is multiplied.

namespace grok::cuda::gemm::swapped {

// The upper bytes of bf16 from 128 on, and of those from -128 on. They are read from shared memory: constants would be
// carried by the instruction, which then cannot carry the selector of permute_bytes, and that would be brought into a
// register each time.
struct alignas(8) UpperBytes {
  uint32_t plus, minus;
};
constexpr UpperBytes kUpperBytes = {0x43434343u, 0xc3c3c3c3u};

// What the weights are; rows of x are e4m3 too, or bf16.
struct E4m3 {};
struct Int8 {};

// A stage has two parts of the weights: of 128 columns of K rows of the gate and those of the up projection (Gated), or
// 128 rows and the next (Tall). Or they are the same rows, 64 at most, and the next 128 columns (Even), so that the rows
// of a block can be chosen to come out even, and a short block still has work for two rounds of the barriers.
struct Gated {};
struct Tall {};
struct Even {};

template <class Weight, class Form, int kRows>
struct Config {
  static constexpr int kTokens = kRows, kSums = kTokens / 2;  // of a tile; a thread's, of a part's rows
  static constexpr bool kInt8 = std::is_same_v<Weight, Int8>;
  static constexpr bool kGated = std::is_same_v<Form, Gated>, kEven = std::is_same_v<Form, Even>;
  static constexpr bool kShort = kInt8 && kEven;         // 8 rows a warp, so that all convert: not 16 for two of four
  static constexpr int kWhole = kEven ? 1 : 2;           // sets of sums
  static constexpr int kDepths = kEven ? 2 : 1;          // times kDepth that a stage has of K
  static constexpr int kPartRows = kEven ? 64 : 128;
  static constexpr int kFlights = kTokens > 64 ? 1 : 2;  // parts whose products run while others are converted
  static constexpr int kXTiles = kDepths * (kInt8 ? 2 : 1), kXColumns = kInt8 ? 64 : 128;  // of a tile of 128 bytes

  struct Stage {  // an operand may reach past the rows of its part, 32 at most: into what follows
    uint8_t weight[2][kPartRows * 128];
    uint8_t x[kXTiles][kTokens * 128];
  };
  static constexpr int kScales = kInt8 ? 4 : kDepths * kTokens;
  static constexpr int kOther = 2048 + 8 * 512 + (kGated && !kInt8 ? 2 * 8 * 4 * kTokens : 0);
  static constexpr int kFitting = (kMostShared - kOther) / static_cast<int>(sizeof(Stage) + 4 * kScales + 16);
  static constexpr int kStages = kFitting < 12 ? kFitting : 12;

  struct Shared {
    alignas(1024) Stage stages[kStages];
    alignas(16) uint8_t y[8][512];  // a warp's, on the way to y
    alignas(16) uint32_t amax[2][kGated && !kInt8 ? kTokens : 1][8];  // by token and warp
    float scale[kStages][kScales];  // of x
    UpperBytes upper;
    Ring<kStages> ring;
    Schedule schedule;
  };
  static_assert(sizeof(Shared) <= kMostShared && kStages >= 3, "stages that cover the way to memory");

  static __host__ __device__ int block_rows(const Swapped& p) {  // of y's columns
    return kGated ? 128 : kEven ? 2 * p.height : 256;
  }
};

// The scales of the thread's rows of the weights, for the group of K that has come. Those of the next are on their way,
// where there are registers for them.
template <class Config>
class RowScales {
 public:
  __device__ __forceinline__ RowScales(const Swapped& p, const Place<Config>& me, const Tile& tile)
      : p_(p), me_(me), tile_(tile) {
    if (kAhead) load(0);
  }

  // For the columns from k on, a multiple of kDepth that grows from call to call.
  __device__ __forceinline__ void advance(int k) {
    if (k != change_) return;
    const int group = k / p_.span;
    if (!kAhead) load(group);
#pragma unroll
    for (int i = 0; i < 2 * Config::kWhole; ++i) now[i] = next_[i];
    if (kAhead && group + 1 < p_.groups) load(group + 1);
    change_ += p_.span;
  }

  float now[2 * Config::kWhole] = {};  // of each part, the row of each half

 private:
  static constexpr bool kAhead = Config::kFlights > 1;

  // 0 where there is no such row.
  __device__ __forceinline__ void load(int group) {
    const float* scale = p_.weight_scale + (static_cast<int64_t>(tile_.expert) * p_.groups + group) * p_.n;
#pragma unroll
    for (int i = 0; i < 2 * Config::kWhole; ++i) {
      const int part = i / 2 * p_.step, at = tile_.column * Config::block_rows(p_) + me_.weight_row(i % 2);
      const bool there = me_.has(i % 2) && at < (Config::kGated ? p_.n / 2 : p_.n - part);
      next_[i] = there ? scale[part + at] : 0.0f;
    }
  }

  const Swapped& p_;
  const Place<Config>& me_;
  const Tile& tile_;
  int change_ = 0;  // where the next group begins
  float next_[2 * Config::kWhole];
};

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

// The tile of this number; false where there are no more.
template <class Config>
__device__ __forceinline__ bool find(const Swapped& p, const Schedule& schedule, int32_t index, Tile& tile) {
  return Walk<Config::kTokens>(schedule, p.experts, index, 0).next(tile);
}

// One warp: a thread of it the tiles, all the scales of x.
template <class Config>
__device__ __forceinline__ void load(const Swapped& p, typename Config::Shared& shared) {
  const bool leads = sm90::elect_one();
  const int rows = Config::kEven ? 2 * p.height : Config::kPartRows;
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
          sm90::load_tile(stage.weight[part], p.weight, full, Config::kEven ? k + part * kDepth : k,
                          Config::kEven ? first : first + part * p.step, tile.expert);
#pragma unroll
        for (int i = 0; i < Config::kXTiles; ++i)
          sm90::load_tile(stage.x[i], p.x, full, k + i * Config::kXColumns, tile.row);
      }
      if constexpr (!Config::kInt8) {
#pragma unroll
        for (int i = sm90::lane_index(); i < Config::kScales; i += 32) {
          const int row = tile.row + i % Config::kTokens, group = k / kDepth + i / Config::kTokens;
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
  const auto* x = stage.x + (Config::kEven ? part * Config::kXTiles / 2 : 0);
  if constexpr (Config::kInt8) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t a[4][4];
      load_operands(weight, half, shared.upper, me, a);
      const uint64_t b = sm90::operand(x[half]);
      sm90::fence_products();
#pragma unroll
      for (int step = 0; step < 4; ++step)
        sm90::multiply<Config::kTokens>(partial, a[step], sm90::advance(b, 32 * step), half + step > 0);
      sm90::commit_products();  // of each half: ptxas counts them so, and one for both would be waited for too long
      if (Config::kFlights == 1) sm90::wait_products<0>(partial);
    }
  } else {
    const uint64_t a = sm90::operand(weight + me.group * me.height * 128), b = sm90::operand(*x);
    sm90::fence_products();
#pragma unroll
    for (int k = 0; k < kDepth; k += 32)
      sm90::multiply<Config::kTokens>(partial, sm90::advance(a, k), sm90::advance(b, k), k > 0);
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
    for (int j = 0; j < (Config::kShort ? 2 : 4); ++j) sums[i + j] = fmaf(scale[j], partial[i + j], sums[i + j]);
  }
}

// The sums of a tile.
template <class Config>
__device__ __forceinline__ void multiply_tile(const Swapped& p, typename Config::Shared& shared,
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
      if (Config::kEven && part && k + kDepth >= p.k) return;  // past the last column
      if (Config::kInt8) scales.advance(Config::kEven ? k + part * kDepth : k);
      const int whole = Config::kEven ? 0 : part, depth = Config::kEven ? part : 0;
      promote(me, shared.scale[at.stage] + depth * Config::kTokens, scales.now + 2 * whole,
              partial[part % Config::kFlights], sums[whole]);
    };
    if constexpr (Config::kFlights == 2) {
      start_part<Config>(shared, at.stage, 0, me, partial[0]);
      start_part<Config>(shared, at.stage, 1, me, partial[1]);
      sm90::wait_products<Config::kInt8 ? 2 : 1>(partial[0]);  // the groups of the second part
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
__device__ __forceinline__ void multiply_tiles(const Swapped& p, typename Config::Shared& shared) {
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
    if constexpr (Config::kGated) {
      multiply_gate(p, me, column, sums[0], sums[1]);
      if constexpr (Config::kInt8)
        store_bf16(p, me, tile, column, sums[0], buffer);
      else
        store_e4m3(p, me, tile, column, sums[0], shared.amax[turn]);
    } else {
      const auto store = [&](int part) {
        if (p.y_is_float)
          store_fp32(p, me, tile, column + part * p.step, sums[part]);
        else
          store_bf16(p, me, tile, column + part * p.step, sums[part], buffer);
      };
      store(0);
      if constexpr (!Config::kEven) store(1);
    }
  }
}

template <class Weight, class Form, int kTokens>
__global__ void __launch_bounds__(kThreads, 1) swapped_kernel(const __grid_constant__ Swapped p) {
  using C = Config<Weight, Form, kTokens>;
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

}  // namespace grok::cuda::gemm::swapped
