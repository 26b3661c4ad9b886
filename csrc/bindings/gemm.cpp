#include <ATen/core/Tensor.h>

#include <atomic>

#include "bindings.h"
#include "cpu/buffer.h"
#include "cpu/gemm.h"
#include "cpu/panel_ops.h"

namespace grok {
namespace {

using cpu::Buffer;
using cpu::Elem;
using cpu::PackedRows;
using cpu::Path;
using cpu::Rows;
using cpu::Weights;

constexpr size_t kKept = size_t{256} << 20;  // bytes of workspace that stay for the next call
constexpr int64_t kTokens = 1024;            // of an expert layer at a time: bounds its workspace
constexpr int64_t kPackedPerTask = 1 << 16;  // values

Elem element(const char* op, const char* name, const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return Elem::f32;
    case at::kBFloat16: return Elem::bf16;
    case at::kChar: return Elem::int8;
    case at::kFloat8_e4m3fn: return Elem::e4m3;
    default: check(false, op, ": ", name, " has dtype ", c10::toString(tensor.scalar_type()), ", which is none of its");
  }
  return Elem::f32;
}

Weights weights(const char* op, const char* name, const at::Tensor& tensor, const std::optional<at::Tensor>& scale,
                const std::optional<at::Tensor>& own) {
  Weights w{};
  w.elem = element(op, name, tensor);
  w.data = tensor.const_data_ptr();
  w.packed = tensor.dim() == 6;
  w.experts = tensor.size(0);
  if (w.packed) {
    const int64_t run = 4 / cpu::size_of(w.elem);
    check(tensor.is_contiguous() && tensor.size(3) == 4 && tensor.size(4) == 16 && tensor.size(5) == run, op, ": ", name,
          " has shape ", tensor.sizes(), ", which pack_weight does not return");
    w.n = tensor.size(1) * cpu::kPanel;
    w.k = tensor.size(2) * run;
  } else {
    check_tensor(op, name, tensor, 3);
    w.n = tensor.size(1);
    w.k = tensor.size(2);
    w.expert_stride = tensor.stride(0);
    w.row_stride = tensor.stride(1);
  }
  if (w.elem == Elem::f32 || w.elem == Elem::bf16) return w;
  check(scale.has_value() && own->dim() == 3 && own->size(0) == w.experts && own->size(2) == w.n && own->size(1) > 0 &&
            w.k % own->size(1) == 0,
        op, ": the scale of ", name, " does not fit its shape ", tensor.sizes());
  w.scale = own->const_data_ptr<float>();
  w.groups = own->size(1);
  return w;
}

std::optional<at::Tensor> contiguous(const std::optional<at::Tensor>& tensor) {
  return tensor ? std::optional(tensor->contiguous()) : std::nullopt;
}

// Runs task(0) .. task(tasks−1) on the threads, each taking the next when it is done with one: tasks differ in size, and
// no result depends on who computes it.
template <class Task>
void share(int64_t tasks, Task task) {
  std::atomic<int64_t> next{0};
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), tasks);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < tasks;) task(i);
    }
  });
}

void pack(PackedRows& packed, const Rows& rows) {
  const int64_t values = std::max<int64_t>(1, cpu::kTile * packed.k);
  at::parallel_for(0, static_cast<int64_t>(packed.tiles.size()), std::max<int64_t>(1, kPackedPerTask / values),
                   [&](int64_t begin, int64_t end) { packed.pack(rows, begin, end); });
}

// A block of rows of one expert that meet a panel together.
struct RowBlock {
  int64_t expert, first_tile, last_tile;
};

std::vector<RowBlock> row_blocks(const PackedRows& rows) {
  std::vector<RowBlock> blocks;
  for (size_t e = 0; e + 1 < rows.expert_tile.size(); ++e) {
    for (int64_t i = rows.expert_tile[e]; i < rows.expert_tile[e + 1];) {
      const int64_t end = rows.block_end(i, rows.expert_tile[e + 1]);
      blocks.push_back({static_cast<int64_t>(e), i, end});
      i = end;
    }
  }
  return blocks;
}

void keep(Buffer& buffer) {
  if (buffer.size() > kKept) buffer.release();
}

at::Tensor grouped_gemm(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& weight_scale,
                        const std::optional<at::Tensor>& offsets, const std::optional<at::Tensor>& x_scale,
                        std::optional<at::ScalarType> out_dtype) {
  const char* op = "grouped_gemm";
  check_tensor(op, "x", x, 2);
  const auto own_scale = contiguous(weight_scale), own_x_scale = contiguous(x_scale);
  const Weights w = weights(op, "weight", weight, weight_scale, own_scale);
  const int64_t m = x.size(0);
  check(x.size(1) == w.k, op, ": x has shape ", x.sizes(), ", expected (M, K) with K=", w.k, " from weight");
  std::vector<int64_t> starts{0, m};
  if (offsets) {
    check_tensor(op, "offsets", *offsets, 1);
    const at::Tensor own = offsets->contiguous();
    const int32_t* from = own.const_data_ptr<int32_t>();
    starts.assign(from, from + own.numel());
  }
  check(static_cast<int64_t>(starts.size()) == w.experts + 1, op, ": offsets has ", starts.size(),
        " entries, expected (E + 1,) with E=", w.experts);
  check(starts.front() == 0 && starts.back() == m && std::is_sorted(starts.begin(), starts.end()), op, ": offsets is ",
        c10::IntArrayRef(starts), ", expected to ascend from 0 to M=", m);

  Rows rows{};
  rows.data = x.const_data_ptr();
  rows.elem = element(op, "x", x);
  rows.stride = x.stride(0);
  rows.index_divisor = 1;
  if (own_x_scale) {
    rows.scale = own_x_scale->const_data_ptr<float>();
    rows.groups = own_x_scale->size(1);
  }
  const at::ScalarType to = out_dtype.value_or(
      rows.elem == Elem::f32 || rows.elem == Elem::bf16 ? x.scalar_type() : at::kBFloat16);
  at::Tensor y = at::empty({m, w.n}, x.options().dtype(to));
  const Elem y_elem = element(op, "out_dtype", y);

  const cpu::Isa isa = cpu::current_isa();
  PackedRows packed(choose_path(isa, rows.elem, w), isa, w.k, starts);
  thread_local Buffer workspace;
  packed.place(workspace.get<char>(packed.bytes()));
  pack(packed, rows);
  const std::vector<RowBlock> blocks = row_blocks(packed);
  const int64_t panels = (w.n + cpu::kPanel - 1) / cpu::kPanel, count = static_cast<int64_t>(blocks.size());
  const cpu::PanelOps& ops = cpu::panel_ops(isa);
  char* out = static_cast<char*>(y.mutable_data_ptr());
  share(panels * count, [&](int64_t task) {
    const RowBlock& b = blocks[task % count];
    const int64_t output = task / count * cpu::kPanel, row = packed.tiles[b.first_tile].row;
    const float* c = panel_product(packed, w, b.expert, output, b.first_tile, b.last_tile, 0);
    ops.store(c, packed.rows(b.first_tile, b.last_tile), std::min(cpu::kPanel, w.n - output), y_elem,
              out + (row * w.n + output) * cpu::size_of(y_elem), w.n);
  });
  keep(workspace);
  return y;
}

}  // namespace
}  // namespace grok

TORCH_LIBRARY_FRAGMENT(grok_cpu, library) {
  library.def(
      "grouped_gemm(Tensor x, Tensor weight, Tensor? weight_scale, Tensor? offsets, Tensor? x_scale, "
      "ScalarType? out_dtype) -> Tensor");
}

TORCH_LIBRARY_IMPL(grok_cpu, CPU, library) { library.impl("grouped_gemm", grok::grouped_gemm); }
