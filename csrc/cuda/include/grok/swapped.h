#pragma once

// The products of gemm.h with swapped operands, for C++ programs: the tensor core's first operand, which has 64 rows,
// holds weights, and its second one, which can be narrow, holds rows of x. A few rows of x then suffice to keep the
// weights streaming at memory bandwidth. int8 weights, which are converted to bf16 in registers, only have these
// kernels.
//
// `tokens` is the number of rows of x in a tile: 16 or 64, or 128 for bf16 rows. Every choice adds in the same order,
// for e4m3 in the order of gemm.h's kernels too, and gives the same bits on an H100. On a chip where no test has shown
// that the tensor core rounds alike, choose one value for a model, never one by the batch.

#include "gemm.h"

namespace grok::cuda {

// As grouped_gemm. bf16 rows of x have the column order and width of `gather_rows`.
void swapped_grouped_gemm(const GroupedGemm& p, int64_t tokens, Stream stream);

// As gate_up for e4m3. For int8 weights y is bf16, in the column order and width that `gather_rows` gives rows of n / 2
// columns, and y_scale is not used.
void swapped_gate_up(const GateUp& p, int64_t tokens, Stream stream);

// Columns of a row that `gather_rows` wrote: dim rounded up to a multiple of 128, padded with zeros.
constexpr int64_t gathered_width(int64_t dim) { return (dim + 127) / 128 * 128; }

// Gathers rows: grouped row i is x[order[i] / active], or x[i] without order. Each 128 columns are permuted as the
// products with int8 weights read them: place 16s + m holds column 32 (m % 8 / 2) + 4s + 2 (m / 8) + m % 2. Rows past
// the last group are not written.
struct GatherRows {
  const uint16_t* x;       // (rows / active, dim) bf16, aligned to 4 bytes
  int64_t x_stride;        // elements between tokens, a multiple of 2
  const int32_t* order;    // (rows,) or null
  const int32_t* offsets;  // (experts + 1,), required with `order`
  uint16_t* y;             // (rows, gathered_width(dim)), contiguous, aligned to 16 bytes
  int64_t rows, dim, active, experts;  // dim a multiple of 2
};
void gather_rows(const GatherRows& p, Stream stream);

}  // namespace grok::cuda
