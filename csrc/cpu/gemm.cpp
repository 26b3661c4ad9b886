#include "gemm.h"

#include <algorithm>
#include <cstring>

#include "buffer.h"
#include "fp8.h"
#include "gemm_kernels.h"
#include "panel_ops.h"

namespace grok::cpu {
namespace {

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Columns of one dword of packed rows.
int64_t columns_of(Path path) { return path == Path::bf16 ? 2 : path == Path::int8 ? 4 : 1; }

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

float element(const void* row, DType elem, int64_t i) {
  switch (elem) {
    case DType::f32: return static_cast<const float*>(row)[i];
    case DType::bf16: return to_float(static_cast<const BF16*>(row)[i]);
    case DType::int8: return static_cast<const int8_t*>(row)[i];
    default: return from_e4m3(static_cast<const uint8_t*>(row)[i]);
  }
}

// Columns from..from+count of a row of k, as fp32.
void spread_f32(const void* row, DType elem, const float* scale, int64_t groups, int64_t from, int64_t count, int64_t k,
                int64_t tile, uint32_t* out) {
  for (int64_t i = from; i < from + count; ++i, out += tile) {
    float value = 0.0f;
    if (i < k) value = element(row, elem, i) * (scale ? scale[groups == 1 ? 0 : i / kScaleGroup] : 1.0f);
    std::memcpy(out, &value, 4);
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

PackedRows::PackedRows(Path path_, Isa isa_, int64_t k_, const std::vector<int64_t>& offsets)
    : path(path_), isa(isa_), k(k_), runs(round_up(k_, 4) / columns_of(path_)),
      groups(path_ == Path::int8 ? (k_ + kScaleGroup - 1) / kScaleGroup : 0), total(offsets.back()) {
  for (size_t e = 0; e + 1 < offsets.size(); ++e) {
    const int64_t rows = offsets[e + 1] - offsets[e], count = (rows + kTile - 1) / kTile;
    const int64_t parts = (count + kRowBlock / kTile - 1) / (kRowBlock / kTile);
    for (int64_t i = 0; i < count; ++i) {  // tiles of equal height, or one less; blocks of as many tiles, or one less
      const int64_t begin = offsets[e] + rows * i / count, end = offsets[e] + rows * (i + 1) / count;
      const int64_t tile = static_cast<int64_t>(tiles.size());
      if (i == 0 || i * parts / count != (i - 1) * parts / count) {
        blocks.push_back({static_cast<int64_t>(e), tile, tile, begin, 0});
      }
      tiles.push_back({begin, end - begin, static_cast<int64_t>(blocks.size()) - 1});
      blocks.back().last_tile = tile + 1;
      blocks.back().rows = end - blocks.back().row;
    }
  }
}

int64_t PackedRows::bytes() const { return round_up(total * runs * 4, 64) + round_up(total * groups * 4, 64) * 2; }

void PackedRows::place(void* workspace) {
  char* at = static_cast<char*>(workspace);
  data = reinterpret_cast<uint32_t*>(at);
  scales = reinterpret_cast<float*>(at += round_up(total * runs * 4, 64));
  bias = reinterpret_cast<int32_t*>(at + round_up(total * groups * 4, 64));
}

void PackedRows::pack(const Rows& x, int64_t first_tile, int64_t last_tile) {
  const int64_t size = size_of(x.elem), bytes = k * size;
  for (int64_t i = first_tile; i < last_tile; ++i) {
    const Tile& t = tiles[i];
    const char* rows[kTile];
    const float* scale[kTile] = {};
    for (int64_t r = 0; r < t.rows; ++r) {
      const int64_t from = x.index ? x.index[t.row + r] / x.index_divisor : t.row + r;
      rows[r] = static_cast<const char*>(x.data) + from * x.stride * size;
      if (x.scale) scale[r] = x.scale + from * x.groups;
    }
    for (int64_t run = 0; run < runs; run += kRunBlock) {
      const int64_t count = std::min(kRunBlock, runs - run);
      for (int64_t r = 0; r < t.rows; ++r) {
        uint32_t* out = this->at(t, run) + r;
        if (path == Path::f32) {
          spread_f32(rows[r], x.elem, scale[r], x.groups, run, count, k, t.rows, out);
        } else {
          spread(rows[r] + 4 * run, bytes - 4 * run, count, t.rows, out);
        }
      }
    }
    if (path != Path::int8) continue;
    for (int64_t r = 0; r < t.rows; ++r) {
      const int8_t* values = reinterpret_cast<const int8_t*>(rows[r]);
      for (int64_t g = 0; g < groups; ++g) {
        int32_t sum = 0;
        for (int64_t c = g * kScaleGroup; c < std::min(k, (g + 1) * kScaleGroup); ++c) sum += values[c];
        bias[(t.row + r) * groups + g] = -128 * sum;
        scales[(t.row + r) * groups + g] = scale[r][x.groups == 1 ? 0 : g];
      }
    }
  }
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
  int64_t most = kRunBlock * columns_of(x.path);  // columns at a time
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
