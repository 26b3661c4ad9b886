#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "../common/types.h"
#include "isa.h"

// Products of rows with the matrices of a weight, y = x wᵀ, and what they are made of.
//
// A weight is read in panels of 64 outputs. Of a panel, a run of 256 bytes holds k inputs of each of the 64 outputs, k
// as many as fill 4 bytes; a packed weight lies in memory that way, a plain one is brought into it a block at a time.
// Rows of x are packed in tiles of up to 6, run by run, so that a kernel streams both.
//
// The sum over K of one row and one output is a single chain of additions in the order of K, whatever the number of
// rows, the tile, the block or the thread: that makes a row's bits its own.

namespace grok::cpu {

constexpr int64_t kPanel = 64;      // outputs
constexpr int64_t kRunBytes = 256;  // of a panel
constexpr int64_t kTile = 6;        // rows, at most
constexpr int64_t kRowBlock = 252;  // rows that meet a block of weights while it is in the cache: 42 tiles
constexpr int64_t kRunBlock = 128;  // runs of rows in a block of columns
constexpr int64_t kScaleGroup = 128;  // columns of int8 activations that share a scale

inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// How a product is computed.
//   bf16  bf16 rows, weights exactly converted to bf16, products of pairs added in fp32 (avx512_bf16)
//   int8  int8 rows and weights, exact sums of 128 products, those in fp32 (avx512_bf16)
//   f32   anything, converted to fp32
enum class Path { bf16, int8, f32 };

struct Rows {
  const void* data;
  DType elem;
  int64_t stride;               // elements from row to row
  const float* scale;           // of int8 and e4m3, (rows, groups), contiguous
  int64_t groups;               // 1, or one each 128 columns
  const int32_t* index;         // row i is row index[i] / index_divisor of data; null: row i − first
  int64_t index_divisor;
  int64_t first;                // which row lies at the beginning of data, where that has only some
};

struct Weights {
  const void* data;
  DType elem;
  bool packed;
  int64_t experts, n, k;
  int64_t expert_stride, row_stride;  // of a plain weight, in elements
  const float* scale;                 // (experts, groups, n), contiguous; null for f32 and bf16
  int64_t groups;

  // Where the panel of these outputs begins in a packed weight; null for a plain one.
  const uint8_t* panel(int64_t expert, int64_t output) const {
    return packed ? static_cast<const uint8_t*>(data) + (expert * n + output) * k * size_of(elem) : nullptr;
  }
};

Path choose_path(Isa isa, DType x, const Weights& w);

// Rows in the form that the kernels read, in the order in which they do: row block by row block, in that one block of
// columns after the other, tile by tile, run by run. A tile alone in its block lies in one piece.
class PackedRows {
 public:
  struct Tile {
    int64_t row, rows;  // the first, and their number
    int64_t block;      // the row block that it is in
  };
  // Rows of one expert that meet a panel together.
  struct RowBlock {
    int64_t expert, first_tile, last_tile;
    int64_t row, rows;
  };

  // offsets: experts + 1 entries, ascending from 0; the rows of e are offsets[e] .. offsets[e+1]−1.
  PackedRows(Path path, Isa isa, int64_t k, const std::vector<int64_t>& offsets);

  int64_t bytes() const;        // of the workspace
  void place(void* workspace);  // 64-byte aligned, used until the last product

  // The rows of these tiles. x holds `columns` columns of them, from `column` on: a multiple of 64, and of 128 where each
  // 128 share a scale.
  void pack(const Rows& x, int64_t first_tile, int64_t last_tile, int64_t column, int64_t columns);

  // A tile's rows from a run on, up to the end of its block of columns: `rows` dwords are a run.
  uint32_t* at(const Tile& t, int64_t run) const {
    const RowBlock& b = blocks[t.block];
    const int64_t first = run / kRunBlock * kRunBlock, count = std::min(kRunBlock, runs - first);
    return data + b.row * runs + b.rows * first + (t.row - b.row) * count + (run - first) * t.rows;
  }

  Path path;
  Isa isa;
  int64_t k, run_columns, runs;
  int64_t groups;           // of 128 columns, for int8
  int64_t total;            // rows
  std::vector<Tile> tiles;
  std::vector<RowBlock> blocks;
  uint32_t* data = nullptr;
  float* scales = nullptr;  // (rows, groups), for int8
  int32_t* bias = nullptr;  // (rows, groups): −128 times the group's sum, since its weights are taken as w + 128
};

// c (rows, 64) = the product of a row block with the 64 outputs from `output` on (a multiple of 64 in a packed weight;
// columns past n are zeros). It lies in memory of the thread, in one of two slots, until that is used again. `then` is
// the panel that the thread will read after this one, if known.
float* panel_product(const PackedRows& x, const Weights& w, const PackedRows::RowBlock& block, int64_t output, int slot,
                     const uint8_t* then);

}  // namespace grok::cpu
