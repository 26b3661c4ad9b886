#pragma once

#include <vector>

#include "cpu/executor.h"
#include "cpu/gemm/layout.h"

namespace grok::cpu {

// y[r] = x[r] · w[e]ᵀ for the rows r of each expert e, accumulated in fp32, with the scales of both operands applied,
// and rounded once. A dense projection has one expert.
struct GroupedGemm {
  Rows x;                  // (rows, k)
  Weights w;               // (experts, n, k)
  const int32_t* offsets;  // (experts + 1,): expert e has rows offsets[e] .. offsets[e + 1] − 1; null for one expert
  int64_t rows;
  void* y;                 // (rows, n), contiguous
  DType y_type;            // f32 or bf16
};

// Throws std::invalid_argument where offsets do not ascend from 0 to rows.
void grouped_gemm(const GroupedGemm& p, Executor& executor);

// offsets as a vector, checked as above; `op` begins the message.
std::vector<int64_t> checked_offsets(const char* op, const int32_t* offsets, int64_t experts, int64_t rows);

}  // namespace grok::cpu
