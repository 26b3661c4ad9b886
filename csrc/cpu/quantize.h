#pragma once

#include <cstdint>

#include "common/types.h"
#include "cpu/executor.h"

namespace grok::cpu {

// For each row and group of columns: scale = amax / 448 (e4m3) or amax / 127 (int8), an amax below 2⁻¹⁰⁰ counting as
// that; q = x / scale, rounded to nearest even. The bits of a row depend neither on the other rows nor on the
// instruction set.
struct QuantizeRows {
  const void* x;    // (rows, d)
  DType x_type;     // f32 or bf16
  DType q_type;     // e4m3 or int8
  int64_t x_stride; // elements from row to row
  int64_t rows, d;
  int64_t group;    // columns of a group, at least 1
  int64_t groups;   // ceil(d / group)
  void* q;          // (rows, d), contiguous
  float* scale;     // (rows, groups), contiguous
};
void quantize_rows(const QuantizeRows& p, Executor& executor);

}  // namespace grok::cpu
