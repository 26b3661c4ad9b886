#pragma once

#include "cpu/gemm/activation.h"
#include "cpu/gemm/layout.h"
#include "cpu/isa.h"

// What is done with the product of a row block and a panel, (rows, 64) fp32, while it is in the nearest cache.

namespace grok::cpu {

struct Epilogue {
  // result = c · scale, or result + c · scale where `add`. scale (64,); result may be c.
  void (*scale)(const float* c, const float* scale, int64_t rows, bool add, float* result);
  // Rounds the first `outputs` columns to f32 or bf16 and writes them to rows of y, `stride` elements apart.
  void (*store)(const float* c, int64_t rows, int64_t outputs, DType type, void* y, int64_t stride);
  // As `store`, of act(gate) · up.
  void (*activate)(const float* gate, const float* up, int64_t rows, int64_t outputs, Activation activation, DType type,
                   void* y, int64_t stride);
  // y[order[r] / active] += weight[order[r]] · c[r]; y (tokens, 64).
  void (*add_weighted)(const float* c, int64_t rows, const int32_t* order, int64_t active, const float* weight,
                       float* y);
};

const Epilogue& epilogue_for(Isa isa);

}  // namespace grok::cpu
