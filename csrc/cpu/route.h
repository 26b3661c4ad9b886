#pragma once

#include <cstdint>

#include "common/types.h"
#include "cpu/executor.h"

namespace grok::cpu {

// The k largest of softmax(softcap · tanh(x · routerᵀ / softcap)) for each row, in fp32; the sum of the k is made 1
// where renormalize. The bits of a row depend neither on the other rows nor on the instruction set.
struct RouteTopk {
  const void* x;        // (rows, d), f32 or bf16
  DType x_type;
  const float* router;  // (e, d)
  float* weights;       // (rows, k), contiguous
  int32_t* experts;     // (rows, k), contiguous
  int64_t x_stride, router_stride;  // elements from row to row
  int64_t rows, d, e;
  int64_t k;            // 1..e
  float softcap;        // 0 for none
  bool renormalize;
};
void route_topk(const RouteTopk& p, Executor& executor);

// The slots 0..rows·a − 1 ordered by their expert, stable: `order`; and where the slots of each expert begin:
// `offsets`. Throws std::invalid_argument, before it writes anything, for an expert outside 0..num_experts − 1.
struct GroupTokens {
  const int32_t* experts;  // (rows, a), rows `stride` elements apart
  int32_t* order;          // (rows · a,)
  int32_t* offsets;        // (num_experts + 1,)
  int64_t stride, rows, a, num_experts;
};
void group_tokens(const GroupTokens& p);

}  // namespace grok::cpu
