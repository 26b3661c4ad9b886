#include "cpu/gemm/panel_product.h"

#include <cstring>

#include "cpu/buffer.h"
#include "cpu/gemm/block_product.h"
#include "cpu/gemm/codes.h"
#include "cpu/gemm/epilogue.h"
#include "cpu/gemm/group_scales.h"
#include "cpu/gemm/pack_codes.h"

namespace grok::cpu {
namespace {

// Gathers columns from..from+columns−1 of a panel of a weight in rows into runs; zeros past these columns and past n.
void gather_runs(const Weights& w, int64_t expert, int64_t output, int64_t from, int64_t columns, uint32_t* out) {
  const int64_t size = size_of(w.type), runs = round_up(columns, 4) * size / 4, bytes = columns * size;
  const int64_t outputs = std::min(kPanel, w.n - output);
  for (int64_t n = 0; n < kPanel; ++n) {
    if (n >= outputs) {
      for (int64_t run = 0; run < runs; ++run) out[run * kPanel + n] = 0;
      continue;
    }
    const char* row = static_cast<const char*>(w.data) +
                      (expert * w.expert_stride + (output + n) * w.row_stride + from) * size;
    spread(row, bytes, runs, kPanel, out + n);
  }
}

// Packs columns from..from+columns−1 of a panel of codes in rows into blocks; zeros past n.
void gather_codes(const Weights& w, int64_t expert, int64_t output, int64_t from, int64_t columns, uint8_t* blocks) {
  const int64_t outputs = std::min(kPanel, w.n - output);
  if (outputs < kPanel) std::memset(blocks, 0, columns / kCodeColumns * code_block_bytes(w.bits));
  for (int64_t n = 0; n < outputs; ++n) {
    const int8_t* row = static_cast<const int8_t*>(w.data) + expert * w.expert_stride + (output + n) * w.row_stride;
    pack_codes_of_output(row + from, 1, columns, w.bits, w.zero_point, n, blocks);
  }
}

struct Scratch {
  Buffer result[2];  // one for each slot
  Buffer partial;    // of a group of columns that share scales
  Buffer stage;      // converted weights
  Buffer runs;       // gathered weights
};

thread_local Scratch scratch;

}  // namespace

float* panel_product(const PackedRows& x, const Weights& w, const PackedRows::RowBlock& block, int64_t output,
                     int slot, const uint8_t* next) {
  Scratch& s = scratch;
  const int64_t rows = block.rows, expert = block.expert;
  // Path::bf16 and Path::int8 leave the scales of groups to this function.
  const bool scaled = x.path != Path::bf16 && x.path != Path::int8 && (w.groups > 1 || w.bits);
  const int64_t groups = scaled ? 1 : w.groups, group = w.k / groups;
  float* result = s.result[slot].get<float>(rows * kPanel);
  float* sums = groups > 1 ? s.partial.get<float>(rows * kPanel) : result;
  if (group == 0) std::memset(sums, 0, rows * kPanel * 4);

  BlockKernel* kernel = f32_block(x.isa);
  int64_t most = kRunBlock * x.run_columns;  // columns of a block
#if GROK_X86
  if (x.path == Path::bf16) {
    kernel = bf16_block_avx512;
    const bool alone = block.last_tile - block.first_tile == 1;
    if (w.layout == Layout::panels && w.type != DType::bf16 && alone) most = w.k;  // a lone tile is contiguous
  } else if (x.path == Path::bf16_codes) {
    kernel = bf16_codes_block_avx512;
    if (w.layout == Layout::panels && block.last_tile - block.first_tile == 1) most = w.k;
  } else if (x.path == Path::int8) {
    kernel = int8_block_avx512;
  } else if (x.path == Path::int16) {
    kernel = int16_block_avx2;
  } else if (x.path == Path::codes || x.path == Path::int8_groups) {
    kernel = x.isa >= Isa::avx512_vnni ? codes_block_avx512 : codes_block_avx2;
  }
#elif GROK_ARM
  if (x.path != Path::f32) kernel = x.path == Path::bf16 ? bf16_block_neon : int8_block_neon;
#endif
  const Epilogue& epilogue = epilogue_for(x.isa);
  const int64_t run_columns = 4 / size_of(w.type);  // of w
  const uint8_t* panel = w.panel(expert, output);
  BlockProduct b{};
  b.type = w.type;
  b.bits = w.layout == Layout::panels || x.path != Path::f32 ? w.bits : 0;
  b.scaled = scaled;
  b.weights = &w;
  b.expert = expert;
  b.output = output;
  b.x = &x;
  b.rows = &block;
  b.c = sums;
  b.stage = s.stage.get<uint8_t>(kStageBytes);
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t from = g * group, end = from + group; from < end; from += b.columns) {
      b.column = from;
      b.columns = std::min((from / most + 1) * most, end) - from;
      b.first = from == g * group;
      b.next = from + b.columns == w.k ? next : nullptr;
      const int64_t run = from / run_columns;
      if (b.bits && w.layout == Layout::rows) {
        uint8_t* blocks = s.runs.get<uint8_t>(most * kPanel);
        gather_codes(w, expert, output, from, b.columns, blocks);
        b.w = blocks;
      } else if (b.bits) {
        b.w = panel + from / kCodeColumns * code_block_bytes(w.bits);
      } else if (w.layout == Layout::panels) {
        b.w = panel + run * kRunBytes;
      } else {
        const int64_t start = run * run_columns;
        uint32_t* runs = s.runs.get<uint32_t>((most + 4) * kPanel);
        gather_runs(w, expert, output, start, from + b.columns - start, runs);
        b.w = reinterpret_cast<const uint8_t*>(runs);
      }
      kernel(b);
    }
    if (scaled || !w.scales.data) break;
    float scale[kPanel];
    plane_values(w, w.scales, expert, output, g, x.isa, scale);
    epilogue.scale(sums, scale, rows, groups > 1 && g > 0, result);
  }
  return result;
}

}  // namespace grok::cpu
