#pragma once

// Router, top-k and grouping on Hopper (sm_90a), for C++ programs: no torch header, no Python, no CUDA header.
//
// Every launcher runs on the stream that it is given, allocates nothing and does not wait for the device, so that it
// may be captured into a CUDA graph. Pointers are of the device. What the arguments break raises std::invalid_argument,
// what CUDA refuses std::runtime_error; both name the op and the shape. What a kernel does wrong shows, as always, in a
// later call of CUDA. Results are the same bits in every run, and a token's do not depend on the other tokens.

#include <cstdint>

struct CUstream_st;

namespace grok::cuda {

using Stream = CUstream_st*;  // cudaStream_t

constexpr int64_t kMostExperts = 64, kMostChosen = 8;

// The k experts of each token and their weights: l = x · routerᵀ in fp32; with softcap l = softcap · tanh(l / softcap),
// p = softmax(l) over all experts; the k largest p, larger first, ties to the lower index (of NaNs the first k);
// divided by their sum where renormalize.
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

// The order that brings rows of one expert together, stable: order[i] is the index in `chosen` of the i-th grouped row;
// offsets where each expert's rows start. An entry outside 0..experts-1 is in no group: then `order` has an end that is
// not written.
struct GroupTokens {
  const int32_t* chosen;  // (rows,)
  int32_t* order;         // (rows,)
  int32_t* offsets;       // (experts + 1,)
  int64_t rows, experts;  // below 2^31 - 4096; at most kMostExperts
};
void group_tokens(const GroupTokens& p, Stream stream);

// Both. Up to kOneLaunch tokens it is one launch, whose last block groups; above, two. The bits are the same.
struct RouteAndGroup {
  RouteTopk route;
  int32_t* order;     // (tokens · k,)
  int32_t* offsets;   // (experts + 1,)
  uint32_t* counter;  // one, 0 before the first launch, and left 0; launches that may overlap need their own
};
constexpr int64_t kOneLaunch = 512;
void route_and_group(const RouteAndGroup& p, Stream stream);

}  // namespace grok::cuda
