#pragma once

#include <cstdint>

#include "../common/types.h"
#include "isa.h"

namespace grok::cpu {

// The k largest of softmax(softcap(x · routerᵀ)), all in fp32; see grok_kernels/ops.py.
struct RouteTopk {
  const void* x;        // (rows, d), rows x_stride elements apart
  const float* router;  // (e, d), rows router_stride elements apart
  float* weights;       // (rows, k), contiguous
  int32_t* experts;     // (rows, k), contiguous
  int64_t x_stride;
  int64_t router_stride;
  int64_t d;
  int64_t e;
  int64_t k;      // 1..e
  float softcap;  // 0 for none
  bool renormalize;
};

// Computes rows begin..end-1. A row's bits depend neither on the other rows nor on the instruction set.
using RouteTopkRows = void (*)(const RouteTopk&, int64_t begin, int64_t end);

RouteTopkRows route_topk_rows(Isa isa, DType x);

// Stable: `order` has the indices 0..rows·a-1 with those of expert 0 first; `offsets` (num_experts + 1,) where each
// expert's begin. Raises std::invalid_argument, before it writes, for an expert outside 0..num_experts-1.
struct GroupTokens {
  const int32_t* experts;  // (rows, a), rows stride elements apart
  int32_t* order;          // (rows * a,)
  int32_t* offsets;        // (num_experts + 1,)
  int64_t stride;
  int64_t rows;
  int64_t a;
  int64_t num_experts;
};

void group_tokens(const GroupTokens& p);

}  // namespace grok::cpu
