#pragma once

#include <cstdint>

#include "../common/types.h"
#include "isa.h"

namespace grok::cpu {

// y_TD = weight_D * x_TD / sqrt(mean_D(x²) + eps), in fp32, rounded once to x's type.
struct RmsNorm {
  const void* x;       // (rows, d), rows x_stride elements apart
  const void* weight;  // (d,)
  void* y;             // (rows, d), contiguous, of x's type
  int64_t x_stride;
  int64_t d;
  float eps;
};

// Each computes rows begin..end-1. A row's bits depend neither on the other rows nor on the instruction set.
using RmsNormRows = void (*)(const RmsNorm&, int64_t begin, int64_t end);

RmsNormRows rms_norm_rows(Isa isa, DType x, DType weight);

// sum = h + rms(delta, post_weight), or h + delta where that is null; y = rms(sum, pre_weight). All three of h's type.
struct SandwichNorm {
  const void* h;            // (rows, d), rows h_stride elements apart
  const void* delta;        // (rows, d), rows delta_stride elements apart, of h's type
  const void* post_weight;  // (d,), or null
  const void* pre_weight;   // (d,)
  void* sum;                // (rows, d), contiguous
  void* y;                  // (rows, d), contiguous
  int64_t h_stride;
  int64_t delta_stride;
  int64_t d;
  DType post_dtype;
  DType pre_dtype;
  float eps;
};

using SandwichNormRows = void (*)(const SandwichNorm&, int64_t begin, int64_t end);

SandwichNormRows sandwich_norm_rows(Isa isa, DType h);

}  // namespace grok::cpu
