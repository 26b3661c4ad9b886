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
// rows is gathered into runs, one column block at a time.
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

// In memory: the rows of each matrix as they are, or its panels (packed, pack_weight.h).
enum class Layout { rows, panels };

// The matrices of all experts; a dense projection has one expert.
struct Weights {
  const void* data;  // (experts, n, k): f32, bf16, int8 or e4m3
  DType type;
  Layout layout;                      // panels: n a multiple of 64, k of 4; contiguous
  int64_t experts, n, k;
  int64_t expert_stride, row_stride;  // of Layout::rows, in elements; columns are contiguous
  const float* scale;                 // (experts, groups, n), contiguous, of int8 and e4m3; null for f32 and bf16
  int64_t groups;                     // k / groups columns share a scale

  // The panel that begins with this output; null in Layout::rows.
  const uint8_t* panel(int64_t expert, int64_t output) const {
    if (layout == Layout::rows) return nullptr;
    return static_cast<const uint8_t*>(data) + (expert * n + output) * k * size_of(type);
  }
};

}  // namespace grok::cpu
