#pragma once

#include <algorithm>
#include <vector>

#include "cpu/executor.h"
#include "cpu/gemm/layout.h"
#include "cpu/isa.h"

namespace grok::cpu {

// How a product is computed.
//   bf16  bf16 rows, weights converted to bf16 exactly, products of pairs added in fp32
//   bf16_codes  bf16 rows and weights of 4, 5 or 6 bits, the same; sums of up to 128 products are scaled (avx512_bf16)
//   int8  int8 rows and weights, exact integer sums of 128 products, these added in fp32
//   int8_groups  the same where 16, 32 or 64 columns share a scale, with a sum for each group (needs avx512_vnni)
//   int16 int8 rows and weights, the same by products of 16 bits; any groups of scales (needs avx2)
//   codes int8 rows and weights of 4, 5 or 6 bits, exact integer sums of up to 128 products (needs avx2)
//   f32   any types, converted to fp32
// bf16 needs avx512_bf16 or neon_bf16, int8 avx512_vnni or neon_bf16.
enum class Path { bf16, bf16_codes, int8, int8_groups, int16, codes, f32 };

constexpr int64_t kSumUnit = 16;  // columns of a bf16 row that are added up while packing

// The formats alone decide, not the layout: a weight has the same products in either.
Path choose_path(Isa isa, DType x, const Weights& w);

// Writes `runs` dwords of a row, `step` dwords apart; zeros past its last byte.
void spread(const void* row, int64_t bytes, int64_t runs, int64_t step, uint32_t* out);

// Which row of x is row r of the product: index[r] / divisor, or r − first where index is null.
struct RowMap {
  const int32_t* index = nullptr;
  int64_t divisor = 1;
  int64_t first = 0;
};

// Rows in the order in which the kernels read them: row block by row block, in each column block by column block, in
// each tile by tile, in each run by run. A run is a dword of each row: 1 value of fp32, 2 of bf16 or int16 (of each 4
// columns first the even, then the odd ones), 4 of int8 (for codes in the order of their bytes, codes.h). A row block
// of one tile is contiguous along K.
class PackedRows {
 public:
  struct Tile {
    int64_t row, rows;  // the first, and their number
    int64_t block;      // the row block that the tile is in
  };
  struct RowBlock {
    int64_t expert, first_tile, last_tile;  // last_tile: one past the last
    int64_t row, rows;
  };

  // offsets: experts + 1 entries, ascending from 0; the rows of expert e are offsets[e] .. offsets[e + 1] − 1.
  // x: the type of the rows, w: what they are multiplied by.
  PackedRows(Isa isa, DType x, const Weights& w, const std::vector<int64_t>& offsets);

  int64_t bytes() const;        // of the workspace
  void place(void* workspace);  // 64-byte aligned; used until the last product

  // Packs the rows of tiles first_tile .. last_tile − 1. x holds `columns` columns of them, which are columns
  // `column` and following of the whole: both multiples of 64, and of 128 where each 128 columns share a scale.
  void pack(const Rows& x, const RowMap& map, int64_t first_tile, int64_t last_tile, int64_t column, int64_t columns);

  // Packs all rows.
  void pack(const Rows& x, const RowMap& map, Executor& executor);

  // A tile's rows from a run on, up to the end of its column block: each run is t.rows dwords.
  uint32_t* at(const Tile& t, int64_t run) const {
    const RowBlock& b = blocks[t.block];
    const int64_t first = run / kRunBlock * kRunBlock, count = std::min(kRunBlock, runs - first);
    return data + b.row * runs + b.rows * first + (t.row - b.row) * count + (run - first) * t.rows;
  }

  Path path;
  Isa isa;
  int64_t k, run_columns, runs;
  int64_t groups;           // of 128 columns, where rows are int8 on another path than f32; else 0
  int64_t sum_columns, sum_groups;  // of `sums`, on the paths codes and int8_groups; else 0
  int64_t total;            // rows
  std::vector<Tile> tiles;
  std::vector<RowBlock> blocks;
  uint32_t* data = nullptr;
  float* unit_sums = nullptr;  // (rows, k / kSumUnit) of bf16 rows, on the bf16_codes path
  float* scales = nullptr;     // (rows, groups)
  int32_t* bias = nullptr;     // (rows, groups): −128 · the group's sum, since vpdpbusd multiplies by w + 128
  int16_t* sums = nullptr;     // (rows, sum_groups): of sum_columns values each
};

}  // namespace grok::cpu
