#pragma once

#include "gemm.h"

// What happens to a product of rows with a panel, (rows, 64) fp32, once it is there.

namespace grok::cpu {

enum class Activation { gelu_tanh, gelu, silu };

struct PanelOps {
  // result = c · scale, or result + c · scale where add; scale (64,), result may be c.
  void (*scale)(const float* c, const float* scale, int64_t rows, bool add, float* result);
  // The first `outputs` columns to rows of y, `stride` elements apart, of type f32 or bf16.
  void (*store)(const float* c, int64_t rows, int64_t outputs, DType elem, void* y, int64_t stride);
  // act(gate) · up, stored likewise.
  void (*activate)(const float* gate, const float* up, int64_t rows, int64_t outputs, Activation activation, DType elem,
                   void* y, int64_t stride);
  // y[order[r] / a] += weight[order[r]] · c[r], y (tokens, 64).
  void (*add_weighted)(const float* c, int64_t rows, const int32_t* order, int64_t a, const float* weight, float* y);
};

const PanelOps& panel_ops(Isa isa);

}  // namespace grok::cpu
