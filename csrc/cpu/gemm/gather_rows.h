#pragma once

#include <cstdint>

#include "common/types.h"
#include "cpu/executor.h"
#include "cpu/gemm/layout.h"

namespace grok::cpu {

// out[i] = row rows[i] of w's one matrix in fp32, times multiplier, rounded once to out_type.
struct GatherRows {
  Weights w;
  const int32_t* rows;  // (count,), in 0..n−1
  int64_t count;
  float multiplier;
  void* out;       // (count, k), contiguous
  DType out_type;  // f32 or bf16
};
void gather_rows(const GatherRows& p, Executor& executor);

}  // namespace grok::cpu
