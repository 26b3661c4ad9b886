#pragma once

#include "cpu/gemm/packed_rows.h"

// The innermost kernels, one for each Path and instruction set: a column block of a panel times the tiles of a row
// block.

namespace grok::cpu {

struct BlockProduct {
  const uint8_t* w;  // the run that holds column `column`
  DType type;        // of w
  int64_t column, columns;
  const PackedRows* x;
  const PackedRows::RowBlock* rows;
  float* c;             // (rows, 64)
  bool first;           // c is written; else it is added to
  void* stage;          // kStageBytes of workspace, for converted weights
  const uint8_t* next;  // what this thread reads after the block, where it does not follow in memory; null if unknown
};

using BlockKernel = void(const BlockProduct&);

constexpr int64_t kStageBytes = 32 << 10;  // a column block of a panel as fp32 or as bf16; stays in L1

#if GROK_X86
BlockKernel bf16_block_avx512, int8_block_avx512;
#elif GROK_ARM
BlockKernel bf16_block_neon, int8_block_neon;
#endif
BlockKernel* f32_block(Isa isa);

}  // namespace grok::cpu
