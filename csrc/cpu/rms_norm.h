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

// Computes rows begin..end-1. A row's bits depend neither on the other rows nor on the instruction set.
using RmsNormRows = void (*)(const RmsNorm&, int64_t begin, int64_t end);

RmsNormRows rms_norm_rows(Isa isa, DType x, DType weight);

}  // namespace grok::cpu
