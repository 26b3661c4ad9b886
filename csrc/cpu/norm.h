#pragma once

#include <cstdint>

#include "common/types.h"
#include "cpu/executor.h"

// The bits of a row depend neither on the other rows nor on the instruction set.

namespace grok::cpu {

// y = weight · x / sqrt(mean(x²) + eps) for each row, in fp32, rounded once.
struct RmsNorm {
  const void* x;           // (rows, d)
  const void* weight;      // (d,)
  void* y;                 // (rows, d), contiguous, of x_type
  DType x_type, weight_type;  // f32 or bf16 each
  int64_t x_stride;        // elements from row to row
  int64_t rows, d;
  float eps;
};
void rms_norm(const RmsNorm& p, Executor& executor);

// sum = h + rms(delta, post_weight), or h + delta where post_weight is null; y = rms(sum, pre_weight).
struct SandwichNorm {
  const void* h;                    // (rows, d)
  const void* delta;                // (rows, d)
  const void* post_weight;          // (d,), or null
  const void* pre_weight;           // (d,)
  void* sum;                        // (rows, d), contiguous
  void* y;                          // (rows, d), contiguous
  DType type;                       // of h, delta, sum and y: f32 or bf16
  DType post_type, pre_type;        // of the weights: f32 or bf16 each
  int64_t h_stride, delta_stride;   // elements from row to row
  int64_t rows, d;
  float eps;
};
void sandwich_norm(const SandwichNorm& p, Executor& executor);

// y = (a + b) / divisor in fp32, rounded once.
struct ScaledSum {
  const void* a;               // (rows, d)
  const void* b;               // (rows, d)
  void* y;                     // (rows, d), contiguous
  DType type;                  // f32 or bf16
  int64_t a_stride, b_stride;  // elements from row to row
  int64_t rows, d;
  float divisor;
};
void scaled_sum(const ScaledSum& p, Executor& executor);

}  // namespace grok::cpu
