#pragma once

// Products of grouped rows with the experts' matrices on Hopper (sm_90a), and the expert layer in them, for C++
// programs: no torch header, no Python, no CUDA header. What route.h says of streams, pointers, errors and bits holds
// here too.

#include "route.h"

namespace grok::cuda {

enum class Type { bf16, e4m3, int8 };
enum class Activation { gelu_tanh, gelu, silu };  // gelu: by erf

// x[i] · weight[e]ᵀ for the rows i = offsets[e]..offsets[e + 1] - 1 of every expert e, accumulated in fp32, the scales
// of both applied. The sum over k is one chain: 32 columns at a time into a partial sum, and every 128 columns that
// sum, times the scale of the row, into the whole.
struct Product {
  Type x_type, weight_type;  // e4m3 with e4m3, bf16 with int8
  const void* x;             // (rows, k), contiguous, aligned to 16 bytes
  const float*
      x_scale;  // of e4m3: that of row i and columns 128g..128g+127 is x_scale[i · x_scale_row + g · x_scale_group]
  int64_t x_scale_row, x_scale_group;  // read fastest with x_scale_row 1; x_scale_group 0 for one scale a row
  const void* weight;                  // (experts, n, k), contiguous, aligned to 16 bytes
  const float* weight_scale;  // (experts, weight_groups, n), for each k / weight_groups columns; e4m3 has one group
  const int32_t* offsets;     // (experts + 1,), from 0 on, never falling; null for one expert with all rows
  int64_t rows, n, k, experts, weight_groups;  // k a multiple of 16 and n of 8; experts at most kMostExperts
};

// y[i] = the product of row i. With `order`, fp32 only, y[order[i]] = row_weights[order[i]] · the product of row i: the
// inverse of the grouping. Rows past the last group are not written.
struct GroupedGemm {
  Product product;
  void* y;  // (rows, n) bf16, or fp32 where y_is_float; aligned to 16 bytes
  bool y_is_float;
  const int32_t* order;      // (rows,) or null
  const float* row_weights;  // (rows,), with `order`
};
void grouped_gemm(const GroupedGemm& p, Stream stream);

// y = act(gate) · up of a product whose matrices stack the gate (rows 0..n/2-1) and the up projection, then quantised
// as `gather_quantize` does it: (rows, n / 2) e4m3, n / 2 a multiple of 16, with scales as those of a Product's x.
struct GateUp {
  Product product;
  Activation activation;
  void* y;
  float* y_scale;
  int64_t y_scale_row, y_scale_group;
};
void gate_up(const GateUp& p, Stream stream);

// The grouped row i is x[order[i] / active] in e4m3: q = e4m3(x / scale), saturating, scale = amax / 448 of each 128
// columns, an amax below 2⁻¹⁰⁰ counting as that. Rows past the last group are not written.
struct GatherQuantize {
  const uint16_t* x;       // (rows / active, dim) bf16, aligned to 16 bytes
  int64_t x_stride;        // elements between tokens, a multiple of 8
  const int32_t* order;    // (rows,)
  const int32_t* offsets;  // (experts + 1,)
  uint8_t* q;              // (rows, dim), contiguous, aligned to 16 bytes
  float* scale;            // that of row i and group g at i · scale_row + g · scale_group
  int64_t scale_row, scale_group;
  int64_t rows, dim, active, experts;  // dim a multiple of 8
};
void gather_quantize(const GatherQuantize& p, Stream stream);

// y[t] = the sum of parts[t · active + a] over a, first to last, rounded once.
struct Combine {
  const float* parts;           // (tokens · active, dim), aligned to 16 bytes
  uint16_t* y;                  // (tokens, dim) bf16, aligned to 8 bytes
  int64_t tokens, active, dim;  // dim a multiple of 4
};
void combine(const Combine& p, Stream stream);

}  // namespace grok::cuda
