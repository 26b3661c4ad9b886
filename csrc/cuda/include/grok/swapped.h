#pragma once

// The products of gemm.h with swapped operands, for C++ programs: the weights are the tensor core's operand of 64 rows,
// and the rows of x the other. A tile then needs few rows of x, so that a product waits for the bytes of the weights
// alone. int8 weights, which become bf16 in registers, have no other kernels.
//
// `tokens` is the number of rows of x in a tile: 16 or 64, for bf16 rows also 128. Each adds in the same order, for e4m3
// that of gemm.h's kernels, and on an H100 gives the same bits. Where no test has shown that the tensor core rounds
// alike, choose one number for a model, never by the batch.

#include "gemm.h"

namespace grok::cuda {

// As grouped_gemm. bf16 rows of x have the order and width of `gather_rows`.
void swapped_grouped_gemm(const GroupedGemm& p, int64_t tokens, Stream stream);

// As gate_up for e4m3. For int8 weights y is bf16, in the order and width that `gather_rows` gives rows of n / 2 columns;
// its scales are not used.
void swapped_gate_up(const GateUp& p, int64_t tokens, Stream stream);

// Columns of a row in the order of gather_rows: dim, rounded up to a multiple of 128. What lies past dim is 0.
constexpr int64_t gathered_width(int64_t dim) { return (dim + 127) / 128 * 128; }

// The grouped row i is x[order[i] / active], or x[i] without order, and each 128 columns of it are in the order in which
// the products with int8 weights take them: place 16s + m holds column 32 (m % 8 / 2) + 4s + 2 (m / 8) + m % 2. Rows past
// the last group are not written.
struct GatherRows {
  const uint16_t* x;       // (rows / active, dim) bf16, aligned to 4 bytes
  int64_t x_stride;        // elements between tokens, a multiple of 2
  const int32_t* order;    // (rows,) or null
  const int32_t* offsets;  // (experts + 1,), with `order`
  uint16_t* y;             // (rows, gathered_width(dim)), contiguous, aligned to 16 bytes
  int64_t rows, dim, active, experts;  // dim a multiple of 2
};
void gather_rows(const GatherRows& p, Stream stream);

}  // namespace grok::cuda
