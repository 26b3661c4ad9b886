#include "cpu/moe/moe.h"

#include <cstring>
#include <string>

#include "cpu/buffer.h"
#include "cpu/dispatch.h"
#include "cpu/gemm/epilogue.h"
#include "cpu/gemm/grouped_gemm.h"
#include "cpu/gemm/panel_product.h"
#include "cpu/quantize.h"
#include "cpu/route.h"
#include "cpu/work_stealing.h"

namespace grok::cpu {
namespace {

constexpr int64_t kTokens = 1024;  // `moe` takes so many tokens at a time, which bounds its workspace

int64_t scale_groups(int64_t columns) { return (columns + kScaleGroup - 1) / kScaleGroup; }

bool quantises(const MoeUp& p) { return p.row_type != p.x_type; }

void check_up(const char* op, const MoeUp& p) {
  check_float((std::string(op) + ": x").c_str(), p.x_type);
  check(!quantises(p) || p.row_type == DType::int8 || p.row_type == DType::e4m3, op, ": row_type is ", name(p.row_type),
        ", expected int8, e4m3 or the type of x");
  check(p.w13.n % 2 == 0, op, ": w13 has ", p.w13.n, " rows, expected 2F");
  check(p.w13.layout == Layout::rows || p.w13.n / 2 % kPanel == 0, op, ": w13 is packed with F=", p.w13.n / 2,
        ", expected a multiple of 64 for gate and up to begin with a panel each");
}

std::vector<int64_t> check_grouping(const char* op, const Grouping& g, const Weights& w, int64_t tokens) {
  check(w.experts == g.experts, op, ": offsets are of ", g.experts, " experts, the weight has ", w.experts);
  for (int64_t r = 0; r < g.rows; ++r) {
    check(g.order[r] >= 0 && g.order[r] < tokens * g.active, op, ": order[", r, "] is ", g.order[r],
          ", expected 0..T*A-1=", tokens * g.active - 1);
  }
  return checked_offsets(op, g.offsets, g.experts, g.rows);
}

// Rows quantised as quantize_rows does it, into a workspace.
Rows quantize_into(DType type, const Rows& x, int64_t count, int64_t columns, Buffer& values, Buffer& scales,
                   Executor& executor) {
  QuantizeRows p{};
  p.x = x.data;
  p.x_type = x.type;
  p.x_stride = x.stride;
  p.q_type = type;
  p.rows = count;
  p.d = columns;
  p.group = kScaleGroup;
  p.groups = scale_groups(columns);
  p.q = values.get<char>(count * columns);
  p.scale = scales.get<float>(count * p.groups);
  quantize_rows(p, executor);
  return {p.q, type, columns, p.scale, p.groups};
}

struct UpWorkspace {
  Buffer packed, values, scales;  // values, scales: x quantised
};

struct PartWorkspace {
  Buffer values, quantised, scales;
};

// Computes act(gate) · up of the grouped rows, as many columns at a time as share a scale, and calls finish(block,
// part, column, columns) on each part while it is in cache: columns `column` and following of the block's rows.
template <class Finish>
void gate_up(const MoeUp& p, const std::vector<int64_t>& offsets, Executor& executor, const Finish& finish) {
  const int64_t f = p.w13.n / 2;
  const Isa isa = current_isa();
  const Epilogue& epilogue = epilogue_for(isa);
  const bool quantise = quantises(p);
  const DType part_type = quantise ? DType::f32 : p.x_type;  // before it is quantised
  thread_local UpWorkspace w;
  Rows x{p.x, p.x_type, p.x_stride, nullptr, 0};
  if (quantise) x = quantize_into(p.row_type, x, p.tokens, p.w13.k, w.values, w.scales, executor);
  PackedRows packed(isa, x.type, p.w13, offsets);
  packed.place(w.packed.get<char>(packed.bytes()));
  packed.pack(x, RowMap{p.grouping.order, p.grouping.active}, executor);
  const PanelTasks tasks(packed, f, quantise ? kScaleGroup : kPanel);
  run_stealing(executor, tasks.count(), [&](int64_t task, int64_t next_task) {
    const auto [block, column] = tasks[task];
    const int64_t columns = std::min(tasks.width(), f - column);
    thread_local PartWorkspace part;
    char* values = part.values.get<char>(block.rows * columns * size_of(part_type));
    for (int64_t output = column; output < column + columns; output += kPanel) {
      const int64_t left = column + columns - output;
      const uint8_t* next =
          left > kPanel ? p.w13.panel(block.expert, output + kPanel) : tasks.panel(p.w13, next_task);
      const float* gate = panel_product(packed, p.w13, block, output, 0, p.w13.panel(block.expert, f + output));
      const float* up = panel_product(packed, p.w13, block, f + output, 1, next);
      epilogue.activate(gate, up, block.rows, std::min(kPanel, left), p.activation, part_type,
                        values + (output - column) * size_of(part_type), columns);
    }
    Rows rows{values, part_type, columns, nullptr, 0};
    if (quantise) rows = quantize_into(p.row_type, rows, block.rows, columns, part.quantised, part.scales, executor);
    finish(block, rows, column, columns);
  });
  w.packed.trim();
}

// The second half, of rows that are packed.
void down(const PackedRows& rows, const MoeDown& p, Executor& executor) {
  const int64_t d = p.w2.n;
  const Epilogue& epilogue = epilogue_for(rows.isa);
  const auto& blocks = rows.blocks;
  run_stealing(executor, (d + kPanel - 1) / kPanel, [&](int64_t task, int64_t next_task) {
    const int64_t output = task * kPanel;
    thread_local Buffer sums;
    float* sum = sums.get<float>(p.tokens * kPanel);
    std::fill(sum, sum + p.tokens * kPanel, 0.0f);
    for (size_t i = 0; i < blocks.size(); ++i) {  // ordered by expert
      const uint8_t* next = nullptr;
      if (i + 1 < blocks.size()) {
        next = p.w2.panel(blocks[i + 1].expert, output);
      } else if (next_task >= 0) {
        next = p.w2.panel(blocks[0].expert, next_task * kPanel);
      }
      const float* c = panel_product(rows, p.w2, blocks[i], output, 0, next);
      epilogue.add_weighted(c, blocks[i].rows, p.grouping.order + blocks[i].row, p.grouping.active, p.weights, sum);
    }
    char* y = static_cast<char*>(p.y) + output * size_of(p.y_type);
    epilogue.store(sum, p.tokens, std::min(kPanel, d - output), p.y_type, y, d);
  });
}

// The caller's grouping restricted to the tokens `token` .. `token` + `count` − 1.
void pick_tokens(const Moe& p, int64_t token, int64_t count, std::vector<int32_t>& order,
                 std::vector<int32_t>& offsets) {
  const int64_t first = token * p.active, last = first + count * p.active;
  order.clear();
  offsets.assign(1, 0);
  for (int64_t e = 0; e < p.w2.experts; ++e) {
    for (int64_t r = p.offsets[e]; r < p.offsets[e + 1]; ++r) {
      const int64_t slot = p.order[r];
      if (slot >= first && slot < last) order.push_back(static_cast<int32_t>(slot - first));
    }
    offsets.push_back(static_cast<int32_t>(order.size()));
  }
}

// Both halves of at most kTokens tokens. The intermediate is packed for the second product by the threads that
// compute it.
void fused(const MoeUp& first, MoeDown& second, Executor& executor) {
  const auto offsets = check_grouping("moe", first.grouping, first.w13, first.tokens);
  const Isa isa = current_isa();
  thread_local Buffer workspace;
  PackedRows inner(isa, first.row_type, second.w2, offsets);
  inner.place(workspace.get<char>(inner.bytes()));
  gate_up(first, offsets, executor,
          [&](const PackedRows::RowBlock& block, const Rows& part, int64_t column, int64_t columns) {
            inner.pack(part, RowMap{nullptr, 1, block.row}, block.first_tile, block.last_tile, column, columns);
          });
  down(inner, second, executor);
  workspace.trim();
}

}  // namespace

void moe_up(const MoeUp& p, Executor& executor) {
  check_up("moe_up", p);
  const auto offsets = check_grouping("moe_up", p.grouping, p.w13, p.tokens);
  const int64_t f = p.w13.n / 2, size = size_of(p.row_type), groups = scale_groups(f);
  gate_up(p, offsets, executor,
          [&](const PackedRows::RowBlock& block, const Rows& part, int64_t column, int64_t columns) {
            for (int64_t r = 0; r < block.rows; ++r) {
              const int64_t row = block.row + r;
              std::memcpy(static_cast<char*>(p.y) + (row * f + column) * size,
                          static_cast<const char*>(part.data) + r * columns * size, columns * size);
              if (part.scale) p.y_scale[row * groups + column / kScaleGroup] = part.scale[r];
            }
          });
}

void moe_down(const MoeDown& p, Executor& executor) {
  check_float("moe_down: y", p.y_type);
  const auto offsets = check_grouping("moe_down", p.grouping, p.w2, p.tokens);
  const Isa isa = current_isa();
  thread_local Buffer workspace;
  PackedRows packed(isa, p.rows.type, p.w2, offsets);
  packed.place(workspace.get<char>(packed.bytes()));
  packed.pack(p.rows, RowMap{}, executor);
  down(packed, p, executor);
  workspace.trim();
}

void moe(const Moe& p, Executor& executor) {
  const int64_t d = p.w2.n, e = p.w2.experts;
  check(p.w13.experts == e && p.w13.n == 2 * p.w2.k && p.w13.k == d, "moe: w13 is (", p.w13.experts, ", ", p.w13.n,
        ", ", p.w13.k, ") and w2 (", e, ", ", d, ", ", p.w2.k, "), expected (E, 2F, D) and (E, D, F)");
  for (int64_t i = 0; i < p.tokens * p.active; ++i) {
    check(p.experts[i] >= 0 && p.experts[i] < e, "moe: experts holds ", p.experts[i], ", expected 0..", e - 1);
  }
  if (p.order) check_grouping("moe", {p.order, p.offsets, p.tokens * p.active, e, p.active}, p.w2, p.tokens);
  MoeUp first{};
  first.x_type = p.x_type;
  first.x_stride = p.x_stride;
  first.w13 = p.w13;
  first.activation = p.activation;
  first.row_type = p.row_type;
  check_up("moe", first);
  MoeDown second{};
  second.w2 = p.w2;
  second.y_type = p.x_type;
  thread_local std::vector<int32_t> order, offsets;
  for (int64_t token = 0; token < p.tokens; token += kTokens) {
    const int64_t count = std::min(kTokens, p.tokens - token);
    Grouping grouping{p.order, p.offsets, count * p.active, e, p.active};
    if (!p.order) {
      order.resize(grouping.rows);
      offsets.resize(e + 1);
      group_tokens({p.experts + token * p.active, order.data(), offsets.data(), p.active, count, p.active, e});
    } else if (count < p.tokens) {
      pick_tokens(p, token, count, order, offsets);
      grouping.rows = static_cast<int64_t>(order.size());
    }
    if (!p.order || count < p.tokens) {
      grouping.order = order.data();
      grouping.offsets = offsets.data();
    }
    const int64_t size = size_of(p.x_type);
    first.x = static_cast<const char*>(p.x) + token * p.x_stride * size;
    first.tokens = second.tokens = count;
    first.grouping = second.grouping = grouping;
    second.weights = p.weights + token * p.active;
    second.y = static_cast<char*>(p.y) + token * d * size;
    fused(first, second, executor);
  }
}

}  // namespace grok::cpu
