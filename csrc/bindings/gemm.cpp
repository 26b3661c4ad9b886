#include <ATen/core/Tensor.h>

#include <atomic>

#include "bindings.h"
#include "cpu/buffer.h"
#include "cpu/gemm.h"
#include "cpu/panel_ops.h"
#include "cpu/quantize.h"
#include "cpu/route.h"
#include "direct.h"

namespace grok {
namespace {

using cpu::Buffer;
using cpu::PackedRows;
using cpu::Path;
using cpu::Rows;
using cpu::Weights;

constexpr size_t kKept = size_t{256} << 20;  // bytes of workspace that stay for the next call
constexpr int64_t kTokens = 1024;            // of an expert layer at a time: bounds its workspace
constexpr int64_t kPackedPerTask = 1 << 16;  // values

DType element(const char* op, const char* name, const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kFloat: return DType::f32;
    case at::kBFloat16: return DType::bf16;
    case at::kChar: return DType::int8;
    case at::kFloat8_e4m3fn: return DType::e4m3;
    default: check(false, op, ": ", name, " has dtype ", c10::toString(tensor.scalar_type()), ", which is none of its");
  }
  return DType::f32;
}

Weights weights(const char* op, const char* name, const at::Tensor& tensor, const std::optional<at::Tensor>& scale) {
  Weights w{};
  w.elem = element(op, name, tensor);
  w.data = tensor.const_data_ptr();
  w.packed = tensor.dim() == 6;
  w.experts = tensor.size(0);
  if (w.packed) {
    const int64_t run = 4 / size_of(w.elem);
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
  if (w.elem == DType::f32 || w.elem == DType::bf16) return w;
  check(scale && scale->dim() == 3 && scale->size(0) == w.experts && scale->size(2) == w.n && scale->size(1) > 0 &&
            w.k % scale->size(1) == 0,
        op, ": the scale of ", name, " does not fit its shape ", tensor.sizes());
  w.scale = scale->const_data_ptr<float>();
  w.groups = scale->size(1);
  return w;
}

std::optional<at::Tensor> contiguous(const std::optional<at::Tensor>& tensor) {
  return tensor ? std::optional(tensor->contiguous()) : std::nullopt;
}

// Runs task(0, …) .. task(tasks−1, …) on the threads. Each goes through a part of its own from its beginning, so that what
// it reads lies in one row, and then takes what others have left, from their ends: tasks differ in size, and no result
// depends on who computes it. A task is told which one its thread does after it, or -1.
template <class Task>
void share(int64_t tasks, Task task) {
  struct alignas(64) Part {
    std::atomic<uint64_t> left;  // its first task, and in the upper half one past its last
  };
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), tasks);
  std::vector<Part> parts(threads);
  for (int64_t i = 0; i < threads; ++i) {
    parts[i].left = static_cast<uint64_t>(tasks * i / threads) | static_cast<uint64_t>(tasks * (i + 1) / threads) << 32;
  }
  const auto take = [&](int64_t worker) {
    for (int64_t i = 0; i < threads; ++i) {
      std::atomic<uint64_t>& left = parts[(worker + i) % threads].left;
      uint64_t now = left.load(std::memory_order_relaxed);
      while (static_cast<uint32_t>(now) < now >> 32) {
        const uint64_t then = i == 0 ? now + 1 : now - (uint64_t{1} << 32);
        if (!left.compare_exchange_weak(now, then, std::memory_order_relaxed)) continue;
        return static_cast<int64_t>(i == 0 ? static_cast<uint32_t>(now) : then >> 32);
      }
    }
    return int64_t{-1};
  };
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) {
      for (int64_t i = take(worker), then; i >= 0; i = then) {
        then = take(worker);
        task(i, then);
      }
    }
  });
}

// What to compute of outputs, `width` at a time, with a block of rows: expert by expert, width by width.
class Products {
 public:
  struct One {
    const PackedRows::RowBlock& block;
    int64_t output;
  };

  Products(const PackedRows& packed, int64_t outputs, int64_t width) : blocks_(packed.blocks), width_(width) {
    const int64_t widths = (outputs + width - 1) / width, count = static_cast<int64_t>(blocks_.size());
    for (int64_t first = 0, last; first < count; first = last) {
      for (last = first; last < count && blocks_[last].expert == blocks_[first].expert;) ++last;
      experts_.push_back({total_, first, last - first});
      total_ += widths * (last - first);
    }
  }

  int64_t count() const { return total_; }
  int64_t width() const { return width_; }

  // The first panel of the weight that this one reads; null without one.
  const uint8_t* panel(const Weights& w, int64_t task) const {
    return task < 0 ? nullptr : w.panel((*this)[task].block.expert, (*this)[task].output);
  }

  One operator[](int64_t task) const {
    size_t e = experts_.size() - 1;
    while (task < experts_[e].task) --e;
    const int64_t i = task - experts_[e].task;
    return {blocks_[experts_[e].block + i % experts_[e].blocks], i / experts_[e].blocks * width_};
  }

 private:
  struct Expert {
    int64_t task, block, blocks;  // its first of either, and the number of its blocks
  };
  const std::vector<PackedRows::RowBlock>& blocks_;
  int64_t width_;
  std::vector<Expert> experts_;
  int64_t total_ = 0;
};

void pack(PackedRows& packed, const Rows& rows) {
  const int64_t values = std::max<int64_t>(1, cpu::kTile * packed.k);
  at::parallel_for(0, static_cast<int64_t>(packed.tiles.size()), std::max<int64_t>(1, kPackedPerTask / values),
                   [&](int64_t begin, int64_t end) { packed.pack(rows, begin, end, 0, packed.k); });
}

void keep(Buffer& buffer) {
  if (buffer.size() > kKept) buffer.release();
}

Rows rows_of(const char* op, const at::Tensor& x, const at::Tensor* scale) {
  Rows rows{};
  rows.data = x.const_data_ptr();
  rows.elem = element(op, "x", x);
  rows.stride = x.stride(0);
  rows.index_divisor = 1;
  if (scale) {
    rows.scale = scale->const_data_ptr<float>();
    rows.groups = scale->size(1);
  }
  return rows;
}

at::Tensor grouped_gemm(const at::Tensor& x, const at::Tensor& weight, const std::optional<at::Tensor>& weight_scale,
                        const std::optional<at::Tensor>& offsets, const std::optional<at::Tensor>& x_scale,
                        std::optional<at::ScalarType> out_dtype) {
  const char* op = "grouped_gemm";
  check_tensor(op, "x", x, 2);
  const auto own_scale = contiguous(weight_scale), own_x_scale = contiguous(x_scale);
  const Weights w = weights(op, "weight", weight, own_scale);
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

  const Rows rows = rows_of(op, x, own_x_scale ? &*own_x_scale : nullptr);
  const at::ScalarType to = out_dtype.value_or(
      rows.elem == DType::f32 || rows.elem == DType::bf16 ? x.scalar_type() : at::kBFloat16);
  at::Tensor y = empty({m, w.n}, to);
  const DType y_elem = element(op, "out_dtype", y);

  const cpu::Isa isa = cpu::current_isa();
  PackedRows packed(choose_path(isa, rows.elem, w), isa, w.k, starts);
  thread_local Buffer workspace;
  packed.place(workspace.get<char>(packed.bytes()));
  pack(packed, rows);
  const Products products(packed, w.n, cpu::kPanel);
  const cpu::PanelOps& ops = cpu::panel_ops(isa);
  char* out = static_cast<char*>(y.mutable_data_ptr());
  share(products.count(), [&](int64_t task, int64_t then) {
    const auto [b, output] = products[task];
    const float* c = panel_product(packed, w, b, output, 0, products.panel(w, then));
    ops.store(c, b.rows, std::min(cpu::kPanel, w.n - output), y_elem,
              out + (b.row * w.n + output) * size_of(y_elem), w.n);
  });
  keep(workspace);
  return y;
}

// Rows quantised per token and group of 128 columns, as the ops do it, into a workspace.
Rows quantize(cpu::Isa isa, DType to, const Rows& x, int64_t count, int64_t d, Buffer& values, Buffer& scales) {
  cpu::Quantize p{};
  p.d = d;
  p.group = cpu::kScaleGroup;
  p.groups = (d + p.group - 1) / p.group;
  p.x = x.data;
  p.x_stride = x.stride;
  p.q = values.get<char>(count * d);
  p.scale = scales.get<float>(count * p.groups);
  const auto rows = cpu::quantize_rows(isa, to, x.elem);
  at::parallel_for(0, count, rows_per_task(d), [&](int64_t begin, int64_t end) { rows(p, begin, end); });
  Rows quantized = x;
  quantized.data = p.q;
  quantized.elem = to;
  quantized.stride = d;
  quantized.scale = p.scale;
  quantized.groups = p.groups;
  return quantized;
}

struct MoeWorkspace {
  std::vector<int32_t> order, offsets;                     // of the rows by expert
  Buffer x, inner;                                         // packed
  Buffer x_bytes, x_scales;                                // quantised
};

// Columns of act(gate) · up for a block of rows, on their way into the packed rows of the second product.
struct Part {
  Buffer values, bytes, scales;
};

struct Tokens {
  int64_t count, a;            // tokens, and experts of each
  Rows x;
  const int32_t* experts;      // (count, a)
  const float* weights;
  char* y;                     // (count, D), of x's type
};

// The expert layer of some tokens. `format` f32: no quantising.
void moe_tokens(const Tokens& tokens, const Weights& w13, const Weights& w2, cpu::Activation activation, DType format) {
  const int64_t t = tokens.count, a = tokens.a, d = w2.n, f = w2.k, e = w2.experts;
  thread_local MoeWorkspace w;
  w.order.resize(t * a);
  w.offsets.resize(e + 1);
  cpu::group_tokens({.experts = tokens.experts, .order = w.order.data(), .offsets = w.offsets.data(), .stride = a, .rows = t,
                     .a = a, .num_experts = e});
  const std::vector<int64_t> starts(w.offsets.begin(), w.offsets.end());
  const int32_t* order = w.order.data();
  const cpu::Isa isa = cpu::current_isa();
  const cpu::PanelOps& ops = cpu::panel_ops(isa);

  // act(gate) · up of the grouped rows, as many columns at a time as share a scale: quantised, and packed for the product
  // with w2, by the thread that has them in its cache
  Rows rows = tokens.x;
  const bool quantises = format != DType::f32;
  const DType elem = quantises ? DType::f32 : rows.elem;  // of act(gate) · up
  if (quantises) rows = quantize(isa, format, rows, t, d, w.x_bytes, w.x_scales);
  rows.index = order;
  rows.index_divisor = a;
  PackedRows packed(choose_path(isa, rows.elem, w13), isa, d, starts);
  packed.place(w.x.get<char>(packed.bytes()));
  pack(packed, rows);
  PackedRows inner(choose_path(isa, rows.elem, w2), isa, f, starts);  // with the same tiles and blocks
  inner.place(w.inner.get<char>(inner.bytes()));
  const Products products(packed, f, quantises ? cpu::kScaleGroup : cpu::kPanel);
  share(products.count(), [&](int64_t task, int64_t then) {
    const auto [b, column] = products[task];
    const int64_t columns = std::min(products.width(), f - column);
    thread_local Part p;
    char* values = p.values.get<char>(b.rows * columns * size_of(elem));
    for (int64_t output = column; output < column + columns; output += cpu::kPanel) {
      const int64_t left = column + columns - output;
      const uint8_t* next = left > cpu::kPanel ? w13.panel(b.expert, output + cpu::kPanel) : products.panel(w13, then);
      const float* gate = panel_product(packed, w13, b, output, 0, w13.panel(b.expert, f + output));
      const float* up = panel_product(packed, w13, b, f + output, 1, next);
      ops.activate(gate, up, b.rows, std::min(cpu::kPanel, left), activation, elem,
                   values + (output - column) * size_of(elem), columns);
    }
    Rows part{};
    part.data = values;
    part.elem = elem;
    part.stride = columns;
    part.first = b.row;
    if (quantises) part = quantize(isa, format, part, b.rows, columns, p.bytes, p.scales);
    inner.pack(part, b.first_tile, b.last_tile, column, columns);
  });

  // and its product with w2, summed over each token's experts in the order of the experts
  share((d + cpu::kPanel - 1) / cpu::kPanel, [&](int64_t task, int64_t then) {
    const int64_t output = task * cpu::kPanel;
    thread_local Buffer sums;
    float* sum = sums.get<float>(t * cpu::kPanel);
    std::fill(sum, sum + t * cpu::kPanel, 0.0f);
    for (size_t i = 0; i < inner.blocks.size(); ++i) {
      const PackedRows::RowBlock& b = inner.blocks[i];
      const uint8_t* next = i + 1 < inner.blocks.size() ? w2.panel(inner.blocks[i + 1].expert, output)
                            : then < 0                  ? nullptr
                                                        : w2.panel(inner.blocks[0].expert, then * cpu::kPanel);
      const float* c = panel_product(inner, w2, b, output, 0, next);
      ops.add_weighted(c, b.rows, order + b.row, a, tokens.weights, sum);
    }
    const DType to = tokens.x.elem;
    ops.store(sum, t, std::min(cpu::kPanel, d - output), to, tokens.y + output * size_of(to), d);
  });
  for (Buffer* buffer : {&w.x, &w.inner}) keep(*buffer);
}

at::Tensor moe(const at::Tensor& x, const at::Tensor& topk_weights, const at::Tensor& experts, const at::Tensor& w13,
               const std::optional<at::Tensor>& w13_scale, const at::Tensor& w2,
               const std::optional<at::Tensor>& w2_scale, c10::string_view activation, c10::string_view act_format) {
  const char* op = "moe";
  check_tensor(op, "x", x, 2);
  check_tensor(op, "topk_weights", topk_weights, 2);
  check_tensor(op, "experts", experts, 2);
  const auto own13 = contiguous(w13_scale), own2 = contiguous(w2_scale);
  const Weights up = weights(op, "w13", w13, own13), down = weights(op, "w2", w2, own2);
  check(up.n == 2 * down.k && up.experts == down.experts && x.size(1) == up.k && down.n == up.k &&
            experts.sizes() == topk_weights.sizes() && experts.size(0) == x.size(0),
        op, ": x has shape ", x.sizes(), ", experts ", experts.sizes(), ", topk_weights ", topk_weights.sizes(), ", w13 ",
        w13.sizes(), " and w2 ", w2.sizes(), ", which do not fit together");
  check(!up.packed || down.k % cpu::kPanel == 0, op, ": w13 is packed with F=", down.k,
        ", expected a multiple of 64 for gate and up to begin with a panel each");
  const at::Tensor own_experts = experts.contiguous(), own_weights = topk_weights.contiguous();
  const int32_t* expert = own_experts.const_data_ptr<int32_t>();
  for (int64_t i = 0; i < own_experts.numel(); ++i) {
    check(expert[i] >= 0 && expert[i] < up.experts, op, ": experts holds ", expert[i], ", expected 0..", up.experts - 1);
  }
  const auto act = activation == "gelu_tanh" ? cpu::Activation::gelu_tanh
                   : activation == "gelu"    ? cpu::Activation::gelu
                                             : cpu::Activation::silu;
  const DType format = act_format == "fp8" ? DType::e4m3 : act_format == "int8" ? DType::int8 : DType::f32;
  at::Tensor y = empty(x.sizes(), x.scalar_type());
  const int64_t a = experts.size(1);
  Tokens tokens{0, a, rows_of(op, x, nullptr), expert, own_weights.const_data_ptr<float>(),
                static_cast<char*>(y.mutable_data_ptr())};
  for (int64_t left = x.size(0); left > 0; left -= tokens.count) {
    tokens.count = std::min(left, kTokens);
    moe_tokens(tokens, up, down, act, format);
    tokens.x.data = static_cast<const char*>(tokens.x.data) + tokens.count * tokens.x.stride * size_of(tokens.x.elem);
    tokens.experts += tokens.count * a;
    tokens.weights += tokens.count * a;
    tokens.y += tokens.count * down.n * size_of(tokens.x.elem);
  }
  return y;
}

const Direct kDirect[] = {{"grouped_gemm", grouped_gemm}, {"moe", moe}};

}  // namespace
}  // namespace grok

TORCH_LIBRARY_FRAGMENT(grok_cpu, library) {
  library.def(
      "grouped_gemm(Tensor x, Tensor weight, Tensor? weight_scale, Tensor? offsets, Tensor? x_scale, "
      "ScalarType? out_dtype) -> Tensor");
  library.def(
      "moe(Tensor x, Tensor topk_weights, Tensor experts, Tensor w13, Tensor? w13_scale, Tensor w2, Tensor? w2_scale, "
      "str activation, str act_format) -> Tensor");
}

TORCH_LIBRARY_IMPL(grok_cpu, CPU, library) {
  library.impl("grouped_gemm", grok::grouped_gemm);
  library.impl("moe", grok::moe);
}
