#pragma once

#include <cstdint>
#include <type_traits>

#include "pipeline.cuh"
#include "swapped_store.cuh"

// GEMMs with swapped operands: the weights are the tensor core's operand of 64 rows, x is the narrow one. e4m3 × e4m3
// for few rows of x, where only the weights' bytes should cost time, and int8 × bf16 for any number of rows.
//
// One thread keeps the loads of as many stages in flight as shared memory holds. Two warpgroups multiply different
// weight rows with the same rows of x. For every 128 columns of K, a chain of wgmma adds to a partial sum, which is
// then promoted to fp32 times the scale of the row of x (e4m3), or of the weight row and its group of K (int8). A
// warpgroup waits only for its own part of a stage, and converts int8 while the part before is being multiplied.

namespace grok::cuda::gemm::swapped {

// The upper bytes of the bf16 numbers 128..255, and of -128 and -256. They are read from shared memory: as a constant
// they would be PRMT's immediate operand, and the selector, which must then be in a register, would be loaded for each
// PRMT.
struct alignas(8) UpperBytes {
  uint32_t plus, minus;
};
constexpr UpperBytes kUpperBytes = {0x43434343u, 0xc3c3c3c3u};

// The type of the weights. Rows of x are e4m3 for E4m3, bf16 for Int8.
struct E4m3 {};
struct Int8 {};

// A stage holds two parts of the weights:
//   Gated  128 columns of K of 128 gate rows, and of the 128 up rows that belong to them
//   Tall   128 columns of K of 128 rows, and of the next 128 rows
//   Even   256 columns of K of the same rows, at most 32 per warpgroup: their number can be chosen for even rounds, and
//          a short block still pays the latency of the barriers only once for twice the bytes
struct Gated {};
struct Tall {};
struct Even {};

template <class Weight, class Form, int kRows>
struct Config {
  static constexpr int kTokens = kRows, kSums = kTokens / 2;  // rows of x in a tile; sums of a part, per thread
  static constexpr bool kInt8 = std::is_same_v<Weight, Int8>;
  static constexpr bool kGated = std::is_same_v<Form, Gated>, kEven = std::is_same_v<Form, Even>;
  static constexpr bool kShort = kInt8 && kEven;         // 8 rows in each of 4 warps rather than 16 in 2: all convert
  static constexpr int kWhole = kEven ? 1 : 2;           // sets of totals
  static constexpr int kDepths = kEven ? 2 : 1;          // columns of K in a stage, in units of kDepth
  static constexpr int kPartRows = kEven ? 64 : 128;
  static constexpr int kFlights = kTokens > 64 ? 1 : 2;  // parts in flight: multiply one, convert the next
  static constexpr int kXTiles = kDepths * (kInt8 ? 2 : 1), kXColumns = kInt8 ? 64 : 128;  // of 128 bytes each

  struct Stage {  // an operand may extend past the rows of its part, by up to 32, into what follows
    uint8_t weight[2][kPartRows * 128];
    uint8_t x[kXTiles][kTokens * 128];
  };
  static constexpr int kScales = kInt8 ? 4 : kDepths * kTokens;
  static constexpr int kOther = 2048 + 8 * 512 + (kGated && !kInt8 ? 2 * 8 * 4 * kTokens : 0);
  static constexpr int kFitting = (kMostShared - kOther) / static_cast<int>(sizeof(Stage) + 4 * kScales + 16);
  static constexpr int kStages = kFitting < 12 ? kFitting : 12;

  struct Shared {
    alignas(1024) Stage stages[kStages];
    alignas(16) uint8_t y[8][512];  // a staging buffer per warp
    alignas(16) uint32_t amax[2][kGated && !kInt8 ? kTokens : 1][8];  // by token and warp; two tiles take turns
    float scale[kStages][kScales];  // of x
    UpperBytes upper;
    Ring<kStages> ring;
    Schedule schedule;
  };
  static_assert(sizeof(Shared) <= kMostShared && kStages >= 3, "stages that cover the way to memory");

  static __host__ __device__ int block_rows(const Swapped& p) {  // weight rows of a block, that is, columns of y
    return kGated ? 128 : kEven ? 2 * p.height : 256;
  }
};

// The scales of the thread's weight rows for the current group of K. Those of the next group are prefetched where there
// are registers for them.
template <class Config>
class RowScales {
 public:
  __device__ __forceinline__ RowScales(const Swapped& p, const Place<Config>& me, const Tile& tile)
      : p_(p), me_(me), tile_(tile) {
    if (kAhead) load(0);
  }

  // Makes `now` the scales of column k, a multiple of kDepth that does not fall from call to call.
  __device__ __forceinline__ void advance(int k) {
    if (k != change_) return;
    const int group = k / p_.span;
    if (!kAhead) load(group);
#pragma unroll
    for (int i = 0; i < 2 * Config::kWhole; ++i) now[i] = next_[i];
    if (kAhead && group + 1 < p_.groups) load(group + 1);
    change_ += p_.span;
  }

  float now[2 * Config::kWhole] = {};  // [2 · part + half]

 private:
  static constexpr bool kAhead = Config::kFlights > 1;

  // A row that does not exist has scale 0.
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
  int change_ = 0;  // first column of the next group
  float next_[2 * Config::kWhole];
};

// Two int8 numbers as bf16, exactly: x = (128 + low seven bits) + (sign ? -256 : -128). Either term is one byte below
// an upper byte of bf16.
__device__ __forceinline__ uint32_t to_bf16(uint32_t low_bits, uint32_t signs, uint32_t selector, UpperBytes upper) {
  return sm90::add_bf16(sm90::permute_bytes(low_bits, upper.plus, selector),
                        sm90::permute_bytes(signs, upper.minus, selector));
}

// Four neighbouring columns, as the operand's registers of places 2t, 2t + 1 and 2t + 8, 2t + 9.
__device__ __forceinline__ void convert(uint32_t bytes, UpperBytes upper, uint32_t& left, uint32_t& right) {
  const uint32_t low_bits = bytes & 0x7f7f7f7fu, signs = bytes & 0x80808080u;
  left = to_bf16(low_bits, signs, 0x4140, upper);
  right = to_bf16(low_bits, signs, 0x4342, upper);
}

// The thread's operands for 4 steps of 16 columns: the first or second half of its part of each row, which is bytes 32t
// to 32t + 31 of the tile's 128. The swizzle shifts the chunks of neighbouring rows by one, so that no bank is read
// twice.
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

// The tile with this index; false when there are no more.
template <class Config>
__device__ __forceinline__ bool find(const Swapped& p, const Schedule& schedule, int32_t index, Tile& tile) {
  return Walk<Config::kTokens>(schedule, p.experts, index, 0).next(tile);
}

// Run by one warp: one of its threads loads the tiles, all of them the scales of x.
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
  for (int i = 0; i < Config::kStages; ++i, at.advance()) wait_empty(shared.ring, at);  // no copy may outlive the warp
}

// Issues the products of one part of a stage. Waits for them only if registers hold no second set of partial sums.
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
      sm90::commit_products();  // one group per half: ptxas counts groups like this, and would wait too long for one
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

// sums += scale · partial, with the scale of the row of x (e4m3) or of the weight row (int8).
template <class Config>
__device__ __forceinline__ void promote(const Place<Config>& me, const float* x_scale, const float* weight_scale,
                                        const float (&partial)[Config::kSums], float (&sums)[Config::kSums]) {
#pragma unroll
  for (int i = 0; i < Config::kSums; i += 4) {
    float scale[4];  // of accumulator 2 · half + token
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

// Computes the sums of a tile.
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
      if (Config::kEven && part && k + kDepth >= p.k) return;  // the second part is past the last column
      if (Config::kInt8) scales.advance(Config::kEven ? k + part * kDepth : k);
      const int whole = Config::kEven ? 0 : part, depth = Config::kEven ? part : 0;
      promote(me, shared.scale[at.stage] + depth * Config::kTokens, scales.now + 2 * whole,
              partial[part % Config::kFlights], sums[whole]);
    };
    if constexpr (Config::kFlights == 2) {
      start_part<Config>(shared, at.stage, 0, me, partial[0]);
      start_part<Config>(shared, at.stage, 1, me, partial[1]);
      sm90::wait_products<Config::kInt8 ? 2 : 1>(partial[0]);  // the second part's groups stay in flight
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
    __syncwarp();  // all lanes have read the stage
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
    find<Config>(p, shared.schedule, sm90::opaque(index), tile);  // recomputed: kept, it would take registers all along
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
    shared.ring.init(C::kInt8 ? 1 : 1 + 32, 8);  // loading threads; multiplying warps
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
