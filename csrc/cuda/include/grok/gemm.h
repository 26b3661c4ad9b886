#pragma once

// Grouped GEMMs on Hopper (sm_90a), and the expert layer made of them, for C++ programs: this header needs no torch, no
// Python and no CUDA header. What route.h says about streams, pointers, errors and reproducibility holds here too.

#include "route.h"

namespace grok::cuda {

enum class Type { bf16, e4m3, int8 };
enum class Activation { gelu_tanh, gelu, silu };  // gelu: by erf

// x[i] · weight[e]ᵀ for the rows i = offsets[e]..offsets[e + 1] - 1 of every expert e, accumulated in fp32, with the
// scales of both applied. The sum over k is one chain: 32 columns at a time are added to a partial sum, and after every
// 128 columns the partial sum, times the scale of the row, is added to the total (promotion).
struct Product {
  Type x_type, weight_type;  // e4m3 with e4m3, bf16 with int8
  const void* x;             // (rows, k), contiguous, aligned to 16 bytes
  const float* x_scale;  // e4m3: x_scale[i · x_scale_row + g · x_scale_group] for row i and columns 128g..128g+127
  int64_t x_scale_row, x_scale_group;  // strides; fastest with x_scale_row 1; x_scale_group 0 for one scale per row
  const void* weight;                  // (experts, n, k), contiguous, aligned to 16 bytes
  const float* weight_scale;  // (experts, weight_groups, n), one for k / weight_groups columns; e4m3 has one group
  const int32_t* offsets;     // (experts + 1,), ascending from 0; null for one expert with all rows
  int64_t rows, n, k, experts, weight_groups;  // k a multiple of 16 and n of 8; experts at most kMostExperts
};

// y[i] = the product of row i. With `order` (fp32 only), y[order[i]] = row_weights[order[i]] · the product of row i,
// which undoes the grouping. Rows past the last group are not written.
struct GroupedGemm {
  Product product;
  void* y;  // (rows, n) bf16, or fp32 where y_is_float; aligned to 16 bytes
  bool y_is_float;
  const int32_t* order;      // (rows,) or null
  const float* row_weights;  // (rows,), required with `order`
};
void grouped_gemm(const GroupedGemm& p, Stream stream);

// y = act(gate) · up, where the product's matrices stack the gate (rows 0..n/2-1) and the up projection (n/2..n-1). y
// is quantised as by `gather_quantize`: (rows, n / 2) e4m3, n / 2 a multiple of 16, with scales strided as a Product's
// x_scale.
struct GateUp {
  Product product;
  Activation activation;
  void* y;
  float* y_scale;
  int64_t y_scale_row, y_scale_group;
};
void gate_up(const GateUp& p, Stream stream);

// Gathers and quantises rows: grouped row i is x[order[i] / active]; q = e4m3(x / scale), saturating, with scale =
// max(amax, 2⁻¹⁰⁰) / 448 for each 128 columns. Rows past the last group are not written.
struct GatherQuantize {
  const uint16_t* x;       // (rows / active, dim) bf16, aligned to 16 bytes
  int64_t x_stride;        // elements between tokens, a multiple of 8
  const int32_t* order;    // (rows,)
  const int32_t* offsets;  // (experts + 1,)
  uint8_t* q;              // (rows, dim), contiguous, aligned to 16 bytes
  float* scale;            // of row i and group g: scale[i · scale_row + g · scale_group]
  int64_t scale_row, scale_group;
  int64_t rows, dim, active, experts;  // dim a multiple of 8
};
void gather_quantize(const GatherQuantize& p, Stream stream);

// y[t] = Σ_a parts[t · active + a], added from a = 0 on and rounded once.
struct Combine {
  const float* parts;           // (tokens · active, dim), aligned to 16 bytes
  uint16_t* y;                  // (tokens, dim) bf16, aligned to 8 bytes
  int64_t tokens, active, dim;  // dim a multiple of 4
};
void combine(const Combine& p, Stream stream);

}  // namespace grok::cuda
