#pragma once

#include <cmath>
#include <cstdint>

#include "../include/grok/route.h"
#include "../launch.cuh"

// Router and grouping. A block multiplies kTokens tokens with all experts, its threads side by side along D, so that
// the router is read once for kTokens tokens. Then one warp per token computes softmax and top k.
//
// The order of additions over D: thread i of a block adds columns 4·i..4·i+3 of each kStep, step after step, by fused
// multiply-adds; then lanes at distance 16, 8, 4, 2, 1 are added; then the warps in order. It depends on neither T nor
// kTokens.

namespace grok::cuda::route {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kExperts = 8;           // experts multiplied at a time
constexpr int kStep = 4 * kThreads;   // columns of D that a block takes at a time
constexpr int kChunk = 4096;          // rows that one block of `group_tokens` places
constexpr int32_t kNone = 0x7fffffff;  // no expert: loses every tie

// Shared memory of grouping: every block counts all rows, then places those of its own chunk.
struct Grouping {
  int32_t before[kWarps][kMostExperts];  // rows of an expert before the chunk, as each warp counted
  int32_t all[kWarps][kMostExperts];
  int32_t next[kMostExperts];  // where the expert's next row goes
};

struct Shared {
  float partial[kWarps][8 * kExperts];  // partial sums by warp, then by token and expert
  float logits[8][kMostExperts];
  Grouping grouping;
  bool last;
};

// Four neighbouring columns, in fp32.
__device__ __forceinline__ float4 load4(const float* x) { return *reinterpret_cast<const float4*>(x); }
__device__ __forceinline__ float4 load4(const uint16_t* x) {
  const uint2 two = *reinterpret_cast<const uint2*>(x);
  return make_float4(__uint_as_float(two.x << 16), __uint_as_float(two.x & 0xffff0000u), __uint_as_float(two.y << 16),
                     __uint_as_float(two.y & 0xffff0000u));
}

// Sums kCount values over the lanes of a warp. While a lane holds several, each step sends half of them to the partner
// and keeps the other half. Value i ends in the lanes with lane · kCount / 32 = i; if kCount is 64, lane i holds values
// 2i and 2i + 1.
template <int kCount, int kBit = 16>
__device__ __forceinline__ void sum_lanes(float* v) {
  if constexpr (kBit > 0) {
    constexpr int kHalf = kCount / 2;
    const bool upper = sm90::lane_index() & kBit;
    if constexpr (kCount > 1) {
#pragma unroll
      for (int i = 0; i < kHalf; ++i) {
        const float away = upper ? v[i] : v[i + kHalf];
        v[i] = (upper ? v[i + kHalf] : v[i]) + __shfl_xor_sync(0xffffffffu, away, kBit);
      }
      sum_lanes<kHalf, kBit / 2>(v);
    } else {
      v[0] += __shfl_xor_sync(0xffffffffu, v[0], kBit);
      sum_lanes<1, kBit / 2>(v);
    }
  }
}

// logits[m][e] of the block's tokens for kExperts experts from `expert` on. Tokens and experts past the last repeat it
// (padding), and their logits are not used.
template <class X, int kTokens>
__device__ __forceinline__ void products(const RouteTopk& p, int64_t token, int expert, Shared& shared) {
  const X* rows = static_cast<const X*>(p.x) + token * p.x_stride;
  const float* router = p.router + expert * p.dim;
  const int last_token = static_cast<int>(min(p.tokens - token, static_cast<int64_t>(kTokens)) - 1);
  const int last_expert = static_cast<int>(min(p.experts - expert, static_cast<int64_t>(kExperts)) - 1);
  float sums[kTokens * kExperts] = {};
#pragma unroll 1
  for (int64_t d = 4 * threadIdx.x; d < p.dim; d += kStep) {
    // 16 rows' addresses would else occupy registers through the loop, 32 of the 128 that let two blocks be resident
    const int tokens = sm90::opaque(last_token), experts = sm90::opaque(last_expert);
    float4 x[kTokens];
#pragma unroll
    for (int m = 0; m < kTokens; ++m) x[m] = load4(rows + min(m, tokens) * p.x_stride + d);
#pragma unroll
    for (int e = 0; e < kExperts; ++e) {
      const float4 w = load4(router + min(e, experts) * p.dim + d);
#pragma unroll
      for (int m = 0; m < kTokens; ++m) {
        float& sum = sums[m * kExperts + e];
        sum = fmaf(x[m].w, w.w, fmaf(x[m].z, w.z, fmaf(x[m].y, w.y, fmaf(x[m].x, w.x, sum))));
      }
    }
  }
  constexpr int kCount = kTokens * kExperts, kEach = kCount > 32 ? kCount / 32 : 1;
  sum_lanes<kCount>(sums);
  const int first = sm90::lane_index() * kCount / 32;
#pragma unroll
  for (int i = 0; i < kEach; ++i) shared.partial[sm90::warp_index()][first + i] = sums[i];
  __syncthreads();
  const int value = threadIdx.x;
  if (value < kCount && expert + value % kExperts < p.experts) {
    float sum = 0.0f;
    for (int warp = 0; warp < kWarps; ++warp) sum += shared.partial[warp][value];
    if (p.softcap > 0.0f) sum = p.softcap * tanhf(sum / p.softcap);
    shared.logits[value / kExperts][expert + value % kExperts] = sum;
  }
  __syncthreads();
}

struct Candidate {
  float p;
  int32_t expert;
};

__device__ __forceinline__ Candidate better(Candidate a, Candidate b) {
  if (a.p > b.p) return a;
  if (b.p > a.p) return b;
  return a.expert < b.expert ? a : b;  // for NaN too: a softmax is all NaN or has none
}

// Softmax and top k of one token, by one warp; a lane has experts `lane` and `lane` + 32.
__device__ __forceinline__ void choose(const RouteTopk& p, int64_t token, const float* logits) {
  const int lane = sm90::lane_index();
  float value[2], largest = -INFINITY, sum = 0.0f;
  Candidate mine[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    value[i] = lane + 32 * i < p.experts ? logits[lane + 32 * i] : -INFINITY;
    largest = fmaxf(largest, value[i]);
  }
  for (int bit = 16; bit; bit /= 2) largest = fmaxf(largest, __shfl_xor_sync(0xffffffffu, largest, bit));
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    value[i] = lane + 32 * i < p.experts ? expf(value[i] - largest) : 0.0f;
    sum += value[i];
  }
  for (int bit = 16; bit; bit /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bit);
#pragma unroll
  for (int i = 0; i < 2; ++i)
    mine[i] = lane + 32 * i < p.experts ? Candidate{value[i] / sum, lane + 32 * i} : Candidate{-1.0f, kNone};
  Candidate kept{};  // lane i keeps the i-th best
  float total = 0.0f;
  for (int place = 0; place < p.k; ++place) {
    Candidate best = better(mine[0], mine[1]);
    for (int bit = 16; bit; bit /= 2)
      best = better(best, {__shfl_xor_sync(0xffffffffu, best.p, bit), __shfl_xor_sync(0xffffffffu, best.expert, bit)});
    total += best.p;
    if (lane == place) kept = best;
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (mine[i].expert == best.expert) mine[i] = {-1.0f, kNone};
  }
  if (lane >= p.k) return;
  p.weights[token * p.k + lane] = p.renormalize ? kept.p / total : kept.p;
  p.chosen[token * p.k + lane] = kept.expert;
}

// Which lanes hold a row of a given expert; each lane may ask for a different expert. Called by all lanes.
struct Votes {
  unsigned bit[6], valid;
  __device__ __forceinline__ Votes(int32_t expert, int64_t experts)
      : valid(__ballot_sync(0xffffffffu, expert >= 0 && expert < experts)) {
#pragma unroll
    for (int i = 0; i < 6; ++i) bit[i] = __ballot_sync(0xffffffffu, expert >> i & 1);
  }
  __device__ __forceinline__ unsigned lanes(int expert) const {
    unsigned mask = valid;
#pragma unroll
    for (int i = 0; i < 6; ++i) mask &= expert >> i & 1 ? bit[i] : ~bit[i];
    return mask;
  }
};

// Counts all rows and places those of `begin`..`end`-1; begin is a multiple of 32. Called by every thread of the block.
__device__ __forceinline__ void group(const GroupTokens& p, int64_t begin, int64_t end, Grouping& shared) {
  const int lane = sm90::lane_index(), warp = sm90::warp_index(), thread = threadIdx.x;
  int32_t before[2] = {}, all[2] = {};
  for (int64_t row = 32 * warp; row < p.rows; row += kThreads) {
    const Votes votes(row + lane < p.rows ? p.chosen[row + lane] : -1, p.experts);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int count = __popc(votes.lanes(lane + 32 * i));
      all[i] += count;
      before[i] += row < begin ? count : 0;
    }
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    shared.before[warp][lane + 32 * i] = before[i];
    shared.all[warp][lane + 32 * i] = all[i];
  }
  __syncthreads();
  if (thread <= p.experts) {
    int32_t offset = 0, passed = 0;
    for (int w = 0; w < kWarps; ++w) {
      for (int e = 0; e < thread; ++e) offset += shared.all[w][e];
      if (thread < p.experts) passed += shared.before[w][thread];
    }
    if (thread < p.experts) shared.next[thread] = offset + passed;
    if (begin == 0) p.offsets[thread] = offset;
  }
  __syncthreads();
  for (int64_t row = begin + thread; row - thread < end; row += kThreads) {
    const int32_t expert = row < end ? p.chosen[row] : -1;
    const Votes votes(expert, p.experts);
#pragma unroll
    for (int i = 0; i < 2; ++i) shared.all[warp][lane + 32 * i] = __popc(votes.lanes(lane + 32 * i));
    __syncthreads();
    if (votes.valid >> lane & 1) {
      int32_t place = shared.next[expert] + __popc(votes.lanes(expert) & ((1u << lane) - 1));
      for (int w = 0; w < warp; ++w) place += shared.all[w][expert];
      p.order[place] = static_cast<int32_t>(row);
    }
    __syncthreads();
    if (thread < p.experts)
      for (int w = 0; w < kWarps; ++w) shared.next[thread] += shared.all[w][thread];
    __syncthreads();  // before the counts are overwritten
  }
}

// Block b takes tokens kTokens·b and following. If p.order is set, the last block to finish groups the rows.
template <class X, int kTokens>
__global__ void __launch_bounds__(kThreads, kTokens > 1 ? 2 : 1) route_kernel(const RouteAndGroup p) {
  Shared& shared = sm90::shared_memory<Shared>();
  const int64_t token = static_cast<int64_t>(blockIdx.x) * kTokens;
  for (int expert = 0; expert < p.route.experts; expert += kExperts)
    products<X, kTokens>(p.route, token, expert, shared);
  const int warp = sm90::warp_index();
  if (warp < kTokens && token + warp < p.route.tokens) choose(p.route, token + warp, shared.logits[warp]);
  if (!p.order) return;
  __threadfence();  // a block that sees this one's count also sees what it chose
  __syncthreads();
  if (threadIdx.x == 0) shared.last = atomicAdd(p.counter, 1u) == gridDim.x - 1;
  __syncthreads();
  if (!shared.last) return;
  __threadfence();
  const int64_t rows = p.route.tokens * p.route.k;
  group({p.route.chosen, p.order, p.offsets, rows, p.route.experts}, 0, rows, shared.grouping);
  if (threadIdx.x == 0) *p.counter = 0;
}

}  // namespace grok::cuda::route
