#pragma once

// Router, top-k and grouping on Hopper (sm_90a), for C++ programs: this header needs no torch, no Python and no CUDA
// header.
//
// Every launcher runs on the given stream, allocates nothing and does not synchronise, so it can be captured into a
// CUDA graph. Pointers are device pointers. A bad argument throws std::invalid_argument, a CUDA error
// std::runtime_error; both name the op and the shape. An error inside a kernel is reported by a later CUDA call, as
// usual. Results have the same bits in every run, and those of a token do not depend on the other tokens.

#include <cstdint>

struct CUstream_st;

namespace grok::cuda {

using Stream = CUstream_st*;  // cudaStream_t

constexpr int64_t kMostExperts = 64, kMostChosen = 8;

// The k experts of each token and their weights: l = x · routerᵀ in fp32; l = softcap · tanh(l / softcap) if softcap is
// not 0; p = softmax(l) over all experts; the k largest p in descending order, ties to the lower index (if p is NaN,
// the first k experts), divided by their sum if renormalize.
struct RouteTopk {
  const void* x;        // (tokens, dim) bf16, or fp32 where x_is_float; aligned to 4 elements
  bool x_is_float;
  const float* router;  // (experts, dim), contiguous, aligned to 16 bytes
  float* weights;       // (tokens, k)
  int32_t* chosen;      // (tokens, k)
  int64_t tokens, dim, experts, k;  // dim a multiple of 4; k at most kMostChosen, experts at most kMostExperts
  int64_t x_stride;                 // elements between tokens, a multiple of 4
  float softcap;                    // 0 for none
  bool renormalize;
};
void route_topk(const RouteTopk& p, Stream stream);

// Groups rows by expert, stably: order[i] is the index in `chosen` of the i-th grouped row, offsets[e] the first
// grouped row of expert e. An entry outside 0..experts-1 belongs to no group; then the end of `order` is not written.
struct GroupTokens {
  const int32_t* chosen;  // (rows,)
  int32_t* order;         // (rows,)
  int32_t* offsets;       // (experts + 1,)
  int64_t rows, experts;  // below 2^31 - 4096; at most kMostExperts
};
void group_tokens(const GroupTokens& p, Stream stream);

// Both ops, with the same bits: in one launch, whose last block to finish groups, up to kOneLaunch tokens; else in two.
struct RouteAndGroup {
  RouteTopk route;
  int32_t* order;     // (tokens · k,)
  int32_t* offsets;   // (experts + 1,)
  uint32_t* counter;  // one value, 0 before a launch and after it; launches that may overlap need a counter each
};
constexpr int64_t kOneLaunch = 512;
void route_and_group(const RouteAndGroup& p, Stream stream);

}  // namespace grok::cuda
