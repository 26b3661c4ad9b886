#pragma once

#include <cstdint>

#include "../common/types.h"
#include "isa.h"

namespace grok::cpu {

// A token of each row: softmax(logits / temperature) cut to top_p, then by inverse CDF; see grok_kernels/ops.py.
struct SampleTopP {
  const void* logits;        // (rows, v), rows logits_stride elements apart
  const float* temperature;  // (rows,), and so the next two
  const float* top_p;
  const float* uniform;
  int64_t* tokens;  // (rows,)
  int64_t logits_stride;
  int64_t v;  // 1..2^31 - 1
};

// Computes rows begin..end-1. A row's token depends neither on the other rows nor on the instruction set.
using SampleTopPRows = void (*)(const SampleTopP&, int64_t begin, int64_t end);

SampleTopPRows sample_top_p_rows(Isa isa, DType logits);

}  // namespace grok::cpu
