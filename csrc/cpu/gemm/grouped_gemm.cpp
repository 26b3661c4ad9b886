#include "cpu/gemm/grouped_gemm.h"

#include <string>

#include "cpu/buffer.h"
#include "cpu/dispatch.h"
#include "cpu/gemm/epilogue.h"
#include "cpu/gemm/panel_product.h"
#include "cpu/work_stealing.h"

namespace grok::cpu {

std::vector<int64_t> checked_offsets(const char* op, const int32_t* offsets, int64_t experts, int64_t rows) {
  if (!offsets) {
    check(experts == 1, op, ": offsets are missing, expected (E + 1,) with E=", experts);
    return {0, rows};
  }
  std::vector<int64_t> result(offsets, offsets + experts + 1);
  if (result.front() == 0 && result.back() == rows && std::is_sorted(result.begin(), result.end())) return result;
  std::string text;
  for (int64_t offset : result) text += (text.empty() ? "[" : ", ") + std::to_string(offset);
  check(false, op, ": offsets is ", text, "], expected to ascend from 0 to M=", rows);
  return {};
}

void grouped_gemm(const GroupedGemm& p, Executor& executor) {
  check_float("grouped_gemm: y", p.y_type);
  const Isa isa = current_isa();
  const Epilogue& epilogue = epilogue_for(isa);
  const auto offsets = checked_offsets("grouped_gemm", p.offsets, p.w.experts, p.rows);
  PackedRows packed(isa, p.x.type, p.w, offsets);
  thread_local Buffer workspace;
  packed.place(workspace.get<char>(packed.bytes()));
  packed.pack(p.x, RowMap{}, executor);
  const PanelTasks tasks(packed, p.w.n, kPanel);
  run_stealing(executor, tasks.count(), [&](int64_t task, int64_t next) {
    const auto [block, output] = tasks[task];
    const float* c = panel_product(packed, p.w, block, output, 0, tasks.panel(p.w, next));
    char* y = static_cast<char*>(p.y) + (block.row * p.w.n + output) * size_of(p.y_type);
    epilogue.store(c, block.rows, std::min(kPanel, p.w.n - output), p.y_type, y, p.w.n);
  });
  workspace.trim();
}

}  // namespace grok::cpu
