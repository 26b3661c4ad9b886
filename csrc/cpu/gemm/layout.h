#pragma once

#include <cstdint>

#include "common/types.h"

// y (M, N) = x (M, K) · wᵀ: the parts that both operands are cut into. All GEMM files use these words.
//
//         w (N, K), cut along N into panels                  x (M, K), cut along M into tiles
//
//            K ──────────────────────────►                     K ──────────────────────────►
//       N  ┌─────┬─────┬─────┬─────┬─────┐                M  ┌─────────────────────────────┐ ┐
//   64  │  │ run │ run │ run │  …  │     │  panel    1-6  │  │                             │ │ tile
//       ▼  ├─────┴─────┴─────┴─────┴─────┤           rows ▼  ├─────────────────────────────┤ ┤
//          │                             │  panel            │                             │ │ tile
//          └─────────────────────────────┘                   └─────────────────────────────┘ ┘
//
//   panel         64 outputs
//   run           256 bytes of a panel: the 4 bytes that hold one, two or four neighbouring columns (fp32, bf16, 8
//                 bits) of each of its outputs. Packed rows have runs too: those 4 bytes of each row of a tile.
//   tile          1 to 6 rows, whose sums a kernel holds in registers while it reads a panel once
//   row block     up to 42 tiles of one expert, which use a piece of a panel while it is in L1
//   column block  128 runs of packed rows: the piece of a panel that a row block uses before the next piece is read
//
// A packed weight (Layout::panels) lies in memory panel by panel, run by run, so that a kernel streams it. A weight in
// rows is gathered into runs, one column block at a time. Weights of fewer than 8 bits: codes.h.
//
// The sum over K of one row and one output is added up in one fixed order, set by the formats alone (within a group of
// scales first, then over the groups), whatever the number of rows, the tile, the block or the thread. That makes the
// bits of a row independent of the rows beside it.

namespace grok::cpu {

constexpr int64_t kPanel = 64;        // outputs of a panel
constexpr int64_t kRunBytes = 256;    // 4 bytes of each
constexpr int64_t kTile = 6;          // rows of a tile, at most
constexpr int64_t kRowBlock = 252;    // rows of a row block, at most: 42 tiles
constexpr int64_t kRunBlock = 128;    // runs of packed rows in a column block
constexpr int64_t kScaleGroup = 128;  // columns of quantised activations that share a scale

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Activations (M, K).
struct Rows {
  const void* data;
  DType type;          // f32, bf16, int8 or e4m3
  int64_t stride;      // elements from row to row; columns are contiguous
  const float* scale;  // (M, groups), contiguous, of int8 and e4m3; null for f32 and bf16
  int64_t groups;      // 1, or one for each 128 columns
};

// The elements of a plane of scales.
enum class ScaleType { f32, f16, u8, i8 };

// Scales or minima: a number for each output and group of columns.
struct Plane {
  const void* data;  // null: the format has no such plane
  ScaleType type;
  int64_t groups;    // k / groups columns share a number
  int64_t expert_stride, panel_stride, group_stride;  // in elements

  // The element of an output; those of the following ones of its panel come after it.
  int64_t at(int64_t expert, int64_t output, int64_t group) const {
    return expert * expert_stride + output / kPanel * panel_stride + group * group_stride + output % kPanel;
  }

  // Of an array (experts, groups, n), contiguous: there the following ones may be of the next panel.
  static Plane by_groups(const void* data, ScaleType type, int64_t groups, int64_t n) {
    return {data, type, groups, groups * n, kPanel, n};
  }
  // Of an array (experts, n / 64, groups, 64), contiguous.
  static Plane by_panels(const void* data, ScaleType type, int64_t groups, int64_t n) {
    return {data, type, groups, groups * n, groups * kPanel, kPanel};
  }
};

// In memory: the rows of each matrix as they are, or its panels (packed, pack_weight.h).
enum class Layout { rows, panels };

// The matrices of all experts; a dense projection has one expert. A value of f32 and bf16 is the weight; of the other
// types the weight is S · value − M in fp32, S and M shared by a group of columns of an output:
//   S = scales, or scales · subscales
//   M = scales · zeros, or −minima, or minima · subminima, or 0
struct Weights {
  const void* data;  // (experts, n, k): f32, bf16, int8 or e4m3; codes in panels as codes.h says
  DType type;        // int8 for codes
  int bits;          // of a code, 4, 5 or 6: in panels code = value + zero_point, in rows values are int8; 0: no codes
  int zero_point;
  Layout layout;     // panels: n a multiple of 64, k of 4; contiguous. Of codes: k of 32, group() of 16
  int64_t experts, n, k;
  int64_t expert_stride, row_stride;  // of Layout::rows, in elements; columns are contiguous
  int64_t groups;                     // k / groups columns share S and M; 1 for f32 and bf16
  Plane scales;                       // null for f32 and bf16
  Plane subscales, minima, subminima, zeros;

  // Without columns any divisor serves: nothing is computed with it.
  int64_t group() const { return k ? k / groups : kScaleGroup; }

  // Bytes of a panel.
  int64_t panel_bytes() const { return kPanel * k * (bits ? bits : 8 * size_of(type)) / 8; }

  // The panel that begins with this output; null in Layout::rows.
  const uint8_t* panel(int64_t expert, int64_t output) const {
    if (layout == Layout::rows) return nullptr;
    return static_cast<const uint8_t*>(data) + (expert * n + output) / kPanel * panel_bytes();
  }
};

}  // namespace grok::cpu
