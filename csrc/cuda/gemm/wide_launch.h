#pragma once

#include "../include/grok/wide.h"

namespace grok::cuda::gemm::wide {

// What the weights are; rows of x are e4m3 too, or bf16.
struct E4m3 {};
struct Int8 {};

// wide_grouped_gemm and wide_gate_up for one of them.
template <class Weight>
void grouped_gemm(const GroupedGemm& p, int64_t tokens, Stream stream);
template <class Weight>
void gate_up(const GateUp& p, int64_t tokens, Stream stream);

}  // namespace grok::cuda::gemm::wide
