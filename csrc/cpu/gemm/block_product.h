#pragma once

#include "cpu/gemm/packed_rows.h"

// The innermost kernels, one for each Path and instruction set: a column block of a panel times the tiles of a row
// block.

namespace grok::cpu {

struct BlockProduct {
  const uint8_t* w;  // the run that holds column `column`; of codes, the block that does
  DType type;        // of w
  int bits;          // of w's codes; 0 where w is runs of `type`
  bool scaled;       // the kernel applies S and M of the weights; else the caller does
  const Weights* weights;
  int64_t expert, output;  // of the panel
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
BlockKernel bf16_block_avx512, int8_block_avx512, bf16_codes_block_avx512, codes_block_avx512, int16_block_avx2,
    codes_block_avx2;
#elif GROK_ARM
BlockKernel bf16_block_neon, int8_block_neon;
#endif
BlockKernel* f32_block(Isa isa);

}  // namespace grok::cpu
