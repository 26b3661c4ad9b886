#include "gemm.h"

#include <algorithm>
#include <cstring>

#include "buffer.h"
#include "gemm_kernels.h"
#include "panel_ops.h"

namespace grok::cpu {
namespace {

// `runs` dwords of a row as they are, `tile` apart; zeros past its last byte.
void spread(const void* row, int64_t bytes, int64_t runs, int64_t tile, uint32_t* out) {
  const char* from = static_cast<const char*>(row);
  const int64_t whole = std::clamp<int64_t>(bytes / 4, 0, runs);
  for (int64_t i = 0; i < whole; ++i) std::memcpy(out + i * tile, from + 4 * i, 4);
  for (int64_t i = whole; i < runs; ++i) {
    uint32_t last = 0;
    if (4 * i < bytes) std::memcpy(&last, from + 4 * i, bytes - 4 * i);
    out[i * tile] = last;
  }
}

// Columns from..from+columns of 64 outputs of a plain weight, as the runs of a packed one; zeros past n and past them.
void gather_runs(const Weights& w, int64_t expert, int64_t output, int64_t from, int64_t columns, uint32_t* out) {
  const int64_t size = size_of(w.elem), runs = round_up(columns, 4) * size / 4, bytes = columns * size;
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

struct Scratch {
  Buffer result[2], partial, stage, runs;
};

thread_local Scratch scratch;

}  // namespace

Path choose_path(Isa isa, DType x, const Weights& w) {
  const int64_t group = w.groups ? w.k / w.groups : w.k;
  if (isa != Isa::avx512_bf16 || w.elem == DType::f32) return Path::f32;
  if (x == DType::bf16 && (w.groups <= 1 || group % 4 == 0)) return Path::bf16;
  if (x == DType::int8 && w.elem == DType::int8 && (w.groups <= 1 || group % kScaleGroup == 0)) return Path::int8;
  return Path::f32;
}

float* panel_product(const PackedRows& x, const Weights& w, const PackedRows::RowBlock& block, int64_t output,
                     int slot, const uint8_t* then) {
  Scratch& s = scratch;
  const int64_t rows = block.rows, expert = block.expert;
  const int64_t groups = w.scale ? w.groups : 1, group = w.k / groups;
  float* result = s.result[slot].get<float>(rows * kPanel);
  float* sums = groups > 1 ? s.partial.get<float>(rows * kPanel) : result;
  if (group == 0) std::memset(sums, 0, rows * kPanel * 4);

  BlockKernel kernel = f32_block(x.isa);
  int64_t most = kRunBlock * x.run_columns;  // columns at a time
#if GROK_X86
  if (x.path == Path::bf16) {
    kernel = bf16_block_avx512;
    const bool alone = block.last_tile - block.first_tile == 1;
    if (w.packed && w.elem != DType::bf16 && alone) most = w.k;  // in one stream, as the rows lie
  } else if (x.path == Path::int8) {
    kernel = int8_block_avx512;
  }
#endif
  const PanelOps& ops = panel_ops(x.isa);
  const int64_t run_columns = 4 / size_of(w.elem);
  const uint8_t* panel = w.panel(expert, output);
  Block b{};
  b.elem = w.elem;
  b.x = &x;
  b.rows = &block;
  b.c = sums;
  b.stage = s.stage.get<uint8_t>(kStageBytes);
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t from = g * group, end = from + group; from < end; from += b.columns) {
      b.column = from;
      b.columns = std::min((from / most + 1) * most, end) - from;
      b.first = from == g * group;
      b.then = from + b.columns == w.k ? then : nullptr;
      const int64_t run = from / run_columns;
      if (w.packed) {
        b.w = panel + run * kRunBytes;
      } else {
        const int64_t start = run * run_columns;
        uint32_t* runs = s.runs.get<uint32_t>((most + 4) * kPanel);
        gather_runs(w, expert, output, start, from + b.columns - start, runs);
        b.w = reinterpret_cast<const uint8_t*>(runs);
      }
      kernel(b);
    }
    if (!w.scale) break;
    float scale[kPanel] = {};
    const float* scales = w.scale + (expert * groups + g) * w.n + output;
    std::copy(scales, scales + std::min(kPanel, w.n - output), scale);
    ops.scale(sums, scale, rows, groups > 1 && g > 0, result);
  }
  return result;
}

}  // namespace grok::cpu
