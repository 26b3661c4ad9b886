#pragma once

#include "cpu/executor.h"
#include "cpu/gemm/activation.h"
#include "cpu/gemm/layout.h"

// The expert layer: y[t] = Σ_a weights[t, a] · down(act(gate x[t]) · up x[t]) of expert experts[t, a].
//
// It is two halves with the grouped rows of act(gate) · up between them. `moe` runs both with that intermediate
// packed in a workspace. A rank that holds a share of the layer calls the halves, and the bits of y do not depend on
// the shares:
//   some rows of gate and up (a range of F)  moe_up; gather the columns of its result; moe_down
//   some rows of w2 (a range of D)           moe_down; gather the columns of its result
//   some experts                             moe_up with their part of order, and of offsets counted from its first
//                                            row; grouped_gemm of its result with w2; gather the rows; weight and sum
//                                            them in the order of the experts
// A range of F must be a multiple of 128 where rows are quantised.

namespace grok::cpu {

// The T · A slots of T tokens and A experts each, grouped by expert. Slot i is choice i % A of token i / A.
struct Grouping {
  const int32_t* order;    // (rows,): row r of the grouping is slot order[r]
  const int32_t* offsets;  // (experts + 1,): the rows of expert e are offsets[e] .. offsets[e + 1] − 1
  int64_t rows, experts;
  int64_t active;          // A
};

// y[r] = act(gate x) · (up x), x the token of slot order[r]. Where row_type is int8 or e4m3, x and y are quantised
// with a scale for each token or row and 128 columns.
struct MoeUp {
  const void* x;         // (tokens, D)
  DType x_type;          // f32 or bf16
  int64_t x_stride;      // elements from token to token
  int64_t tokens;
  Grouping grouping;
  Weights w13;           // (experts, 2F, D): gate is rows 0..F−1, up the rest; Layout::panels needs F a multiple of 64
  Activation activation;
  DType row_type;        // x_type, int8 or e4m3
  void* y;               // (rows, F), contiguous, of row_type
  float* y_scale;        // (rows, ceil(F / 128)), contiguous, where row_type is int8 or e4m3
};
void moe_up(const MoeUp& p, Executor& executor);

// y[t] = Σ_i weights[i] · w2[expert of i] · rows[row of i], over the slots i of token t in the order of their experts.
// Summed in fp32, rounded once; 0 for a token without a slot.
struct MoeDown {
  Rows rows;             // (rows, F): what moe_up gives
  Grouping grouping;
  const float* weights;  // (tokens, A), contiguous
  Weights w2;            // (experts, D, F)
  int64_t tokens;
  void* y;               // (tokens, D), contiguous
  DType y_type;          // f32 or bf16
};
void moe_down(const MoeDown& p, Executor& executor);

struct Moe {
  const void* x;           // (tokens, D)
  DType x_type;            // f32 or bf16
  int64_t x_stride;
  int64_t tokens, active;
  const int32_t* experts;  // (tokens, active), contiguous
  const float* weights;    // (tokens, active), contiguous
  const int32_t* order;    // the grouping of experts as group_tokens gives it, if the caller has it; else both null
  const int32_t* offsets;
  Weights w13;             // (experts, 2F, D)
  Weights w2;              // (experts, D, F)
  Activation activation;
  DType row_type;          // x_type, int8 or e4m3, as in MoeUp
  void* y;                 // (tokens, D), contiguous, of x_type
};
void moe(const Moe& p, Executor& executor);

// All three throw std::invalid_argument where shapes do not fit together or an index would leave its array.

}  // namespace grok::cpu
