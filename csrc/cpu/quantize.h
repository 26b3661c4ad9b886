#pragma once

#include <cstdint>

#include "../common/types.h"
#include "isa.h"

namespace grok::cpu {

// scale = amax / 448 (fp8) or / 127 (int8) of each group of a row's columns; q = x / scale, rounded to the format.
struct Quantize {
  const void* x;     // (rows, d), rows x_stride elements apart
  void* q;           // (rows, d), contiguous, bytes
  float* scale;      // (rows, groups), contiguous
  int64_t x_stride;
  int64_t d;
  int64_t group;   // columns of a group, at least 1
  int64_t groups;  // of a row, the last perhaps short
};

// Computes rows begin..end-1. A row's bits depend neither on the other rows nor on the instruction set.
using QuantizeRows = void (*)(const Quantize&, int64_t begin, int64_t end);

QuantizeRows quantize_rows(Isa isa, DType format, DType x);

}  // namespace grok::cpu
