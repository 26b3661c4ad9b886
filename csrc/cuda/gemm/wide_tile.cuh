#pragma once

#include <cstdint>
#include <type_traits>

#include "../sm90.cuh"
#include "outputs.h"
#include "pipeline.cuh"
#include "schedule.cuh"
#include "wide_launch.h"

// What a block of the wide products is given, holds and computes.

namespace grok::cuda::gemm::wide {

constexpr int kDepth = 128;    // columns of K that go into one partial sum
constexpr int kThreads = 384;  // a warpgroup that loads, two that multiply

struct Wide {
  sm90::TensorMap x, weight;
  const float *x_scale, *weight_scale;
  int64_t x_scale_row, x_scale_group;
  const int32_t* offsets;
  int32_t rows, n, k, experts;
  int32_t groups, span;  // int8: scales of a row of the weights, and the columns of K of each
  int32_t height;        // rows of the weights that a warpgroup has of one part of a stage
  int32_t step;          // rows from the first part to the second
  int32_t width;         // columns of y
  void* y;
  // ToFp32
  const int32_t* order;
  const float* row_weights;
  // ToGated
  Activation activation;
  float* y_scale;
  int64_t y_scale_row, y_scale_group;
};

// Where byte `byte` of row `row` lies in a swizzled tile.
__device__ __forceinline__ int in_tile(int row, int byte) { return row * 128 + (byte ^ row % 8 * 16); }

// The column of x, of 128, at place `place` of the order of gather_rows: a thread of the tensor core's operand has the
// columns 2t, 2t + 1, 2t + 8 and 2t + 9 of each step of 16, and so 32 neighbours in 8 steps.
__device__ __forceinline__ int column_at(int place) {
  const int step = place / 16, m = place % 16;
  return m % 8 / 2 * 32 + 4 * step + m / 8 * 2 + m % 2;
}

// The upper bytes of bf16 from 128 on, and of those from -128 on. They are read from shared memory: constants would be
// carried by the instruction, which then cannot carry the selector of permute_bytes, and that would be brought into a
// register each time.
struct alignas(8) UpperBytes {
  uint32_t plus, minus;
};
constexpr UpperBytes kUpperBytes = {0x43434343u, 0xc3c3c3c3u};

// A stage has two parts of the weights. With kRowParts they are other rows of the same 128 columns: gate and up, or 128
// rows and the next. Else they are the same rows, 64 at most, and the next 128 columns, so that the rows of a block can be
// chosen to come out even, and a short block still has work for two rounds of the barriers.
template <class Weight, class Output, int kTokens, bool kRowParts>
struct Config {
  static constexpr bool kInt8 = std::is_same_v<Weight, Int8>, kParts = kRowParts;
  static constexpr bool kGateUp = std::is_same_v<Output, ToGated>, kFp32 = std::is_same_v<Output, ToFp32>;
  static constexpr bool kShort = kInt8 && !kRowParts;       // 8 rows a warp, so that all convert: not 16 for two of four
  static constexpr bool kReordered = kInt8 && kGateUp;      // its y is an x of the next product
  static constexpr int kWidth = kTokens, kSums = kTokens / 2;  // sums: a thread's, of a part's rows
  static constexpr int kWhole = kRowParts ? 2 : 1;          // sets of sums
  static constexpr int kDepths = kRowParts ? 1 : 2;         // times kDepth that a stage has of K
  static constexpr int kPartRows = kRowParts ? 128 : 64;
  static constexpr int kFlights = kTokens > 64 ? 1 : 2;     // parts whose products run while others are converted
  static constexpr int kXTiles = kDepths * (kInt8 ? 2 : 1);

  struct Stage {  // an operand may reach past the rows of its part, 32 at most: into what follows
    uint8_t weight[2][kPartRows * 128];
    uint8_t x[kXTiles][kTokens * 128];
  };
  static constexpr int kScales = kInt8 ? 4 : kDepths * kTokens;
  static constexpr int kMost = 232448;  // bytes of shared memory
  static constexpr int kOther = 2048 + 8 * 512 + (kGateUp && !kInt8 ? 2 * 8 * 4 * kTokens : 0);
  static constexpr int kFitting = (kMost - kOther) / static_cast<int>(sizeof(Stage) + 4 * kScales + 16);
  static constexpr int kStages = kFitting < 12 ? kFitting : 12;

  struct Shared {
    alignas(1024) Stage stages[kStages];
    alignas(16) uint8_t y[8][512];  // a warp's, on the way to y
    alignas(16) uint32_t amax[2][kGateUp && !kInt8 ? kTokens : 1][8];  // by token and warp
    float scale[kStages][kScales];  // of x
    UpperBytes upper;
    Ring<kStages> ring;
    Schedule schedule;
  };
  static_assert(sizeof(Shared) <= kMost && kStages >= 3, "stages that cover the way to memory");

  static __host__ __device__ int block_rows(const Wide& p) {  // of y's columns
    return kGateUp ? 128 : kRowParts ? 256 : 2 * p.height;
  }
};

// A thread of a warpgroup that multiplies: its accumulator 4j + 2h + i is of row `output(h)` of the block's rows of y's
// columns and of token 8j + `token` + i.
template <class Config>
struct Place {
  int group, warp, row, token, height;

  __device__ __forceinline__ Place(const Wide& p, int lane)
      : group(sm90::warp_index() / 4 - 1),
        warp(sm90::warp_index() % 4),
        row(lane / 4),
        token(lane % 4 * 2),
        height(Config::kParts ? 64 : p.height) {}

  // The first of the 8 rows of a half of the warp's, in the warpgroup's.
  __device__ __forceinline__ int first(int h) const { return Config::kShort ? 8 * warp : 16 * warp + 8 * h; }
  __device__ __forceinline__ bool has(int h) const {
    return Config::kParts || (first(h) < height && !(Config::kShort && h));
  }
  __device__ __forceinline__ int output(int h) const { return group * height + first(h) + row; }
  // The same row in the weights' tile.
  __device__ __forceinline__ int weight_row(int h) const {
    return Config::kReordered ? column_at(output(h)) : output(h);
  }
};

// The scales of the thread's rows of the weights, for the group of K that has come. Those of the next are on their way,
// where there are registers for them.
template <class Config>
class RowScales {
 public:
  __device__ __forceinline__ RowScales(const Wide& p, const Place<Config>& me, const Tile& tile)
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
      const bool there = me_.has(i % 2) && at < (Config::kGateUp ? p_.n / 2 : p_.n - part);
      next_[i] = there ? scale[part + at] : 0.0f;
    }
  }

  const Wide& p_;
  const Place<Config>& me_;
  const Tile& tile_;
  int change_ = 0;  // where the next group begins
  float next_[2 * Config::kWhole];
};

}  // namespace grok::cuda::gemm::wide
