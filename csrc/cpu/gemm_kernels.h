#pragma once

#include "gemm.h"

// The innermost products, one for each path and instruction set: a block of K of a panel with the rows of some tiles.

namespace grok::cpu {

struct Block {
  const uint8_t* w;   // the run that holds column `column`, or starts there
  Elem elem;          // of w
  int64_t column, columns;
  const PackedRows* x;
  int64_t first_tile, last_tile;
  float* c;           // (rows, 64), from the first tile's first row on
  bool first;         // c is written, else added to
  void* stage;        // kStageBytes, for converted weights
};

using BlockKernel = void (*)(const Block&);

constexpr int64_t kStageBytes = 64 << 10;
constexpr int64_t kBf16Columns = kStageBytes / (kPanel * 2);  // that a stage holds
constexpr int64_t kF32Columns = kStageBytes / (kPanel * 4);
constexpr int64_t kInt8Columns = 1024;  // nothing is converted; a multiple of kScaleGroup that stays in the cache
constexpr int64_t kDirectRows = 4;      // with so few, weights are converted in registers, where they are used once

#if GROK_X86
void bf16_block_avx512(const Block& b);
void int8_block_avx512(const Block& b);
#endif
BlockKernel f32_block(Isa isa);

}  // namespace grok::cpu
