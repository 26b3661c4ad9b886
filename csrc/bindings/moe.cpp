#include "cpu/moe/moe.h"

#include <limits>
#include <string>
#include <vector>

#include "bindings.h"
#include "native_op.h"
#include "weight.h"

namespace grok {
namespace {

constexpr int64_t kMostSlots = std::numeric_limits<int32_t>::max();  // T · A: slots are int32

cpu::Activation activation_of(const char* op, const std::string& name) {
  if (name == "gelu_tanh") return cpu::Activation::gelu_tanh;
  if (name == "gelu") return cpu::Activation::gelu;
  check(name == "silu", op, ": activation='", name, "', expected gelu_tanh, gelu or silu");
  return cpu::Activation::silu;
}

// The type of the rows of both products.
DType row_type(const char* op, const std::string& act_format, DType x) {
  if (act_format == "fp8") return DType::e4m3;
  if (act_format == "int8") return DType::int8;
  check(act_format == "none", op, ": act_format='", act_format, "', expected none, fp8 or int8");
  return x;
}

// The kernels' Grouping, over copies of its indices.
struct OwnGrouping {
  std::vector<int32_t> order, offsets;
  cpu::Grouping g{};
};

OwnGrouping grouping_of(const char* op, const at::Tensor& order, const at::Tensor& offsets, int64_t experts,
                        int64_t tokens, int64_t active) {
  check(active >= 1 && (tokens == 0 || active <= kMostSlots / tokens), op, ": active=", active,
        ", expected at least 1, and at most ", kMostSlots, " / T with T=", tokens);
  OwnGrouping own{copy_indices(op, "order", order, 1), copy_indices(op, "offsets", offsets, 1)};
  check(offsets.size(0) == experts + 1, op, ": offsets has shape ", offsets.sizes(), ", expected (E + 1,) with E=",
        experts);
  own.g = {own.order.data(), own.offsets.data(), order.size(0), experts, active};
  return own;
}

void check_weights(const char* op, const at::Tensor& topk_weights) {
  check_tensor(op, "topk_weights", topk_weights, 2);
  check_dtype(op, "topk_weights", topk_weights, at::kFloat);
}

at::Tensor moe(const at::Tensor& x, const at::Tensor& topk_weights, const at::Tensor& experts, const WeightArg& w13,
               const WeightArg& w2, const std::string& activation, const std::string& act_format,
               const OptionalTensor& order, const OptionalTensor& offsets) {
  const char* op = "moe";
  check_tensor(op, "x", x, 2);
  check_weights(op, topk_weights);
  const std::vector<int32_t> own_experts = copy_indices(op, "experts", experts, 2);
  const KernelWeight up = kernel_weight(op, "w13", w13), down = kernel_weight(op, "w2", w2);
  check(x.size(1) == up.w.k && experts.sizes() == topk_weights.sizes() && experts.size(0) == x.size(0), op,
        ": x has shape ", x.sizes(), ", experts ", experts.sizes(), ", topk_weights ", topk_weights.sizes(),
        " and w13 (", w13.experts, ", ", w13.n, ", ", w13.k, "), which do not fit together");
  check(order.has_value() == offsets.has_value(), op, ": ", order ? "offsets" : "order",
        " is None, expected both or none");
  const at::Tensor own_weights = topk_weights.contiguous();
  cpu::Moe p{};
  p.x = x.const_data_ptr();
  p.x_type = float_dtype(op, "x", x);
  p.x_stride = x.stride(0);
  p.tokens = x.size(0);
  p.active = experts.size(1);
  p.experts = own_experts.data();
  p.weights = own_weights.const_data_ptr<float>();
  check(p.active == 0 || p.tokens <= kMostSlots / p.active, op, ": experts has shape ", experts.sizes(), ", expected ",
        kMostSlots, " entries at most");
  OwnGrouping own;
  if (order) {
    own = grouping_of(op, *order, *offsets, up.w.experts, p.tokens, std::max<int64_t>(1, p.active));
    check_size(op, "order", *order, 0, "T*A", p.tokens * p.active);
    p.order = own.g.order;
    p.offsets = own.g.offsets;
  }
  p.w13 = up.w;
  p.w2 = down.w;
  p.activation = activation_of(op, activation);
  p.row_type = row_type(op, act_format, p.x_type);
  at::Tensor y = empty(x.sizes(), x.scalar_type());
  p.y = y.mutable_data_ptr();
  cpu::moe(p, executor());
  return y;
}

// Rows (R, F) of x's type; or, quantised, with their scales (R, ceil(F / 128)).
std::tuple<at::Tensor, OptionalTensor> moe_up(const at::Tensor& x, const at::Tensor& order, const at::Tensor& offsets,
                                              int64_t active, const WeightArg& w13, const std::string& activation,
                                              const std::string& act_format) {
  const char* op = "moe_up";
  check_tensor(op, "x", x, 2);
  const KernelWeight up = kernel_weight(op, "w13", w13);
  check(x.size(1) == up.w.k, op, ": x has shape ", x.sizes(), ", expected (T, D) with D=", up.w.k, " from w13");
  cpu::MoeUp p{};
  p.x = x.const_data_ptr();
  p.x_type = float_dtype(op, "x", x);
  p.x_stride = x.stride(0);
  p.tokens = x.size(0);
  const OwnGrouping own = grouping_of(op, order, offsets, up.w.experts, p.tokens, active);
  p.grouping = own.g;
  p.w13 = up.w;
  p.activation = activation_of(op, activation);
  p.row_type = row_type(op, act_format, p.x_type);
  const int64_t f = up.w.n / 2, groups = (f + cpu::kScaleGroup - 1) / cpu::kScaleGroup;
  const at::ScalarType dtype = p.row_type == DType::int8   ? at::kChar
                               : p.row_type == DType::e4m3 ? at::kFloat8_e4m3fn
                                                           : x.scalar_type();
  at::Tensor rows = empty({p.grouping.rows, f}, dtype);
  OptionalTensor scale;
  if (p.row_type != p.x_type) scale = empty({p.grouping.rows, groups}, at::kFloat);
  p.y = rows.mutable_data_ptr();
  p.y_scale = scale ? scale->mutable_data_ptr<float>() : nullptr;
  cpu::moe_up(p, executor());
  return {rows, scale};
}

at::Tensor moe_down(const at::Tensor& rows, const OptionalTensor& row_scale, const at::Tensor& topk_weights,
                    const at::Tensor& order, const at::Tensor& offsets, const WeightArg& w2, at::ScalarType out_dtype) {
  const char* op = "moe_down";
  check_tensor(op, "rows", rows, 2);
  const KernelWeight down = kernel_weight(op, "w2", w2);
  check_weights(op, topk_weights);
  check(topk_weights.is_contiguous(), op, ": topk_weights has strides ", topk_weights.strides(),
        ", expected contiguous");
  cpu::MoeDown p{};
  p.weights = topk_weights.const_data_ptr<float>();
  p.tokens = topk_weights.size(0);
  p.y_type = float_dtype(op, "out_dtype", out_dtype);
  const OwnGrouping own = grouping_of(op, order, offsets, down.w.experts, p.tokens, topk_weights.size(1));
  p.grouping = own.g;
  p.rows.data = rows.const_data_ptr();
  p.rows.type = element_type(op, "rows", rows);
  p.rows.stride = rows.stride(0);
  check(rows.size(0) == p.grouping.rows && rows.size(1) == down.w.k, op, ": rows has shape ", rows.sizes(),
        ", expected (R, F) with R=", p.grouping.rows, " from order and F=", down.w.k, " from w2");
  const int64_t groups = (down.w.k + cpu::kScaleGroup - 1) / cpu::kScaleGroup;
  const bool is_float = p.rows.type == DType::f32 || p.rows.type == DType::bf16;
  check(is_float != row_scale.has_value(), op, ": row_scale is ", row_scale ? "given" : "None", " for rows of ",
        c10::toString(rows.scalar_type()));
  if (row_scale) {
    check_tensor(op, "row_scale", *row_scale, 2);
    check_dtype(op, "row_scale", *row_scale, at::kFloat);
    check(row_scale->sizes() == at::IntArrayRef({p.grouping.rows, groups}) &&
              row_scale->is_contiguous(),
          op, ": row_scale has shape ", row_scale->sizes(), ", expected (", p.grouping.rows, ", ", groups,
          "), contiguous");
    p.rows.scale = row_scale->const_data_ptr<float>();
    p.rows.groups = groups;
  }
  p.w2 = down.w;
  at::Tensor y = empty({p.tokens, down.w.n}, out_dtype);
  p.y = y.mutable_data_ptr();
  cpu::moe_down(p, executor());
  return y;
}

}  // namespace

void define_moe(pybind11::module_& module) {
  using pybind11::arg;
  define_native_op(module, "moe", moe, arg("x"), arg("topk_weights"), arg("experts"), arg("w13"), arg("w2"),
                   arg("activation"), arg("act_format"), arg("order") = pybind11::none(),
                   arg("offsets") = pybind11::none());
  define_native_op(module, "moe_up", moe_up, arg("x"), arg("order"), arg("offsets"), arg("active"), arg("w13"),
                   arg("activation"), arg("act_format"));
  define_native_op(module, "moe_down", moe_down, arg("rows"), arg("row_scale"), arg("topk_weights"), arg("order"),
                   arg("offsets"), arg("w2"), arg("out_dtype"));
}

}  // namespace grok
