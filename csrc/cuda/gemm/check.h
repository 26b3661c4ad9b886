#pragma once

#include <cstdint>
#include <string>

#include "../include/grok/gemm.h"
#include "../launch.cuh"

// The checks that the launchers of products share, and how their messages name a shape.

namespace grok::cuda::gemm {

inline std::string shape_of(const Product& p) {
  return "M=" + std::to_string(p.rows) + " N=" + std::to_string(p.n) + " K=" + std::to_string(p.k) +
         " E=" + std::to_string(p.experts);
}

inline void check_aligned(const char* op, const std::string& shape, const char* name, const void* pointer, int bytes) {
  check(reinterpret_cast<uintptr_t>(pointer) % bytes == 0, op, " of ", shape, ": ", name, " is not aligned to ", bytes,
        " bytes");
}

// Checks and fills the parameters that all products have.
template <class Params>
Params params_of(const char* op, const std::string& shape, const Product& p, void* y) {
  check(p.rows >= 0 && p.rows < 1ll << 30, op, " of ", shape, ": M=", p.rows, ", expected 0..2^30-1");
  check(p.n >= 8 && p.n < 1ll << 30 && p.n % 8 == 0, op, " of ", shape, ": N=", p.n, ", expected a multiple of 8");
  check(p.k >= 16 && p.k < 1ll << 30 && p.k % 16 == 0, op, " of ", shape, ": K=", p.k, ", expected a multiple of 16");
  check(p.experts >= 1 && p.experts <= kMostExperts, op, " of ", shape, ": E=", p.experts, ", expected 1..",
        kMostExperts);
  check(p.offsets || p.experts == 1, op, " of ", shape, ": no offsets, expected them for more than one expert");
  check_aligned(op, shape, "x", p.x, 16);
  check_aligned(op, shape, "weight", p.weight, 16);
  check_aligned(op, shape, "weight_scale", p.weight_scale, 16);
  check_aligned(op, shape, "y", y, 16);
  Params k = {};
  k.x_scale = p.x_scale;
  k.weight_scale = p.weight_scale;
  k.x_scale_row = p.x_scale_row;
  k.x_scale_group = p.x_scale_group;
  k.offsets = p.offsets;
  k.rows = static_cast<int32_t>(p.rows);
  k.n = static_cast<int32_t>(p.n);
  k.k = static_cast<int32_t>(p.k);
  k.experts = static_cast<int32_t>(p.experts);
  k.y = y;
  return k;
}

template <class Params>
Params params_of(const char* op, const std::string& shape, const GroupedGemm& p) {
  check(!p.order || (p.y_is_float && p.row_weights), op, " of ", shape, ": order without row_weights, or y in bf16");
  Params k = params_of<Params>(op, shape, p.product, p.y);
  k.width = k.n;
  k.order = p.order;
  k.row_weights = p.row_weights;
  return k;
}

template <class Params>
Params params_of(const char* op, const std::string& shape, const GateUp& p) {
  check(p.product.n % 32 == 0, op, " of ", shape, ": N=", p.product.n, ", expected a multiple of 32");
  Params k = params_of<Params>(op, shape, p.product, p.y);
  k.step = k.width = k.n / 2;
  k.activation = p.activation;
  k.y_scale = p.y_scale;
  k.y_scale_row = p.y_scale_row;
  k.y_scale_group = p.y_scale_group;
  return k;
}

// The tensor map of the weights, in boxes of `rows` rows by 128 bytes.
inline TensorMap weight_map(const char* op, const std::string& shape, const Product& p, int rows) {
  const auto n = static_cast<uint64_t>(p.n), k = static_cast<uint64_t>(p.k);
  return tensor_map(op, shape,
                    {p.weight,
                     Element::byte,
                     3,
                     {k, n, static_cast<uint64_t>(p.experts)},
                     {0, k, k * n},
                     {128, static_cast<uint32_t>(rows), 1}});
}

// The most tiles that any routing can need: tiles of `rows` rows, times `columns` tiles along N.
inline int64_t most_tiles(const char* op, const std::string& shape, const Product& p, int64_t rows, int64_t columns) {
  const int64_t most = (p.rows / rows + (p.experts < p.rows ? p.experts : p.rows)) * columns;
  check(most < 1ll << 31, op, " of ", shape, ": ", most, " tiles, expected fewer than 2^31");
  return most;
}

}  // namespace grok::cuda::gemm
