#pragma once

namespace grok::cuda::gemm {

// What becomes of the sums: rows of bf16; rows of fp32, in their place or weighted and scattered; act(gate) · up, in
// e4m3, or of int8 weights in bf16.
struct ToBf16 {};
struct ToFp32 {};
struct ToGated {};

}  // namespace grok::cuda::gemm
