#pragma once

#include <algorithm>

#include "cpu/gemm/layout.h"
#include "cpu/isa.h"

namespace grok::cpu {

// A plane's numbers as fp32, for the 64 outputs from `output` on and a group of `plane.groups`; zeros past output n.
void plane_values(const Weights& w, const Plane& plane, int64_t expert, int64_t output, int64_t group, Isa isa,
                  float* values);

// S and M (64 each) with weight = S · code − M, for the outputs from `output` on and one of w.groups groups. Code is
// the value where the weight has no codes. With a zero point M is zero_point · S, exactly: such formats have no other.
void group_scales(const Weights& w, int64_t expert, int64_t output, int64_t group, Isa isa, float* s, float* m);

// Columns of a segment: those that share the scales of the weight (of two levels: the first) and of int8 rows, 128 at
// most.
inline int64_t segment_columns(const Weights& w) {
  return w.subscales.data ? kScaleGroup : std::min(w.group(), kScaleGroup);
}

// The 64 bytes of a group in a plane of u8 or i8, from `output` on; zeros past output n, by way of `room`.
const uint8_t* group_bytes(const Weights& w, const Plane& plane, int64_t expert, int64_t output, int64_t group,
                           uint8_t* room);

// Prefetches the scales and minima of `columns` columns from `column` on; past the end: of the panel that follows.
void prefetch_scales(const Weights& w, int64_t expert, int64_t output, int64_t column, int64_t columns);

}  // namespace grok::cpu
