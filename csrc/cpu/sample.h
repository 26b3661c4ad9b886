#pragma once

#include <cstdint>

#include "common/types.h"
#include "cpu/executor.h"

namespace grok::cpu {

// A token for each row: softmax(logits / temperature), cut to the smallest set of tokens whose probabilities reach
// top_p, sampled by inverse CDF at `uniform`. The largest logit where temperature is not above 0. A row's token
// depends neither on the other rows nor on the instruction set.
struct SampleTopP {
  const void* logits;        // (rows, v), f32 or bf16
  DType logits_type;
  int64_t logits_stride;     // elements from row to row
  const float* temperature;  // (rows,)
  const float* top_p;        // (rows,)
  const float* uniform;      // (rows,), in [0, 1)
  int64_t* tokens;           // (rows,)
  int64_t rows;
  int64_t v;                 // 1..2³¹ − 1
};
void sample_top_p(const SampleTopP& p, Executor& executor);

}  // namespace grok::cpu
