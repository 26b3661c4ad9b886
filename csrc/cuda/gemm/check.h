#pragma once

#include <cstdint>
#include <string>

#include "../launch.cuh"
#include "../include/grok/gemm.h"

// What the launchers of products check, and how they name a problem.

namespace grok::cuda::gemm {

inline std::string shape_of(const Product& p) {
  return "M=" + std::to_string(p.rows) + " N=" + std::to_string(p.n) + " K=" + std::to_string(p.k) +
         " E=" + std::to_string(p.experts);
}

inline void check_aligned(const char* op, const std::string& shape, const char* name, const void* pointer, int bytes) {
  check(reinterpret_cast<uintptr_t>(pointer) % bytes == 0, op, " of ", shape, ": ", name, " is not aligned to ", bytes,
        " bytes");
}

inline void check_product(const char* op, const Product& p) {
  const std::string shape = shape_of(p);
  check(p.rows >= 0 && p.rows < 1ll << 30, op, " of ", shape, ": M=", p.rows, ", expected 0..2^30-1");
  check(p.n >= 8 && p.n < 1ll << 30 && p.n % 8 == 0, op, " of ", shape, ": N=", p.n, ", expected a multiple of 8");
  check(p.k >= 16 && p.k < 1ll << 30 && p.k % 16 == 0, op, " of ", shape, ": K=", p.k, ", expected a multiple of 16");
  check(p.experts >= 1 && p.experts <= kMostExperts, op, " of ", shape, ": E=", p.experts, ", expected 1..",
        kMostExperts);
  check(p.offsets || p.experts == 1, op, " of ", shape, ": no offsets, expected them for more than one expert");
  check_aligned(op, shape, "x", p.x, 16);
  check_aligned(op, shape, "weight", p.weight, 16);
  check_aligned(op, shape, "weight_scale", p.weight_scale, 16);
}

// A kernel's parameters with what all products have in common, checked before.
template <class Params>
Params params_of(const Product& p) {
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
  return k;
}

}  // namespace grok::cuda::gemm
