// torch bindings of the Hopper GEMMs, in the library grok_cuda::. grok_kernels/ops has the contract of each op and the
// rest of its checks; grok_kernels/cuda.py decides which calls come here.

#include "cuda/include/grok/swapped.h"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "tensors.h"

namespace grok {
namespace {

constexpr int64_t kGroup = 128;

int64_t groups(int64_t columns) { return (columns + kGroup - 1) / kGroup; }

bool is_int8(const at::Tensor& weight) { return weight.scalar_type() == at::kChar; }

// Weights must be contiguous: copying them would take as long as the product.
void check_weight(const char* op, const char* name, const at::Tensor& weight, const char* scale_name,
                  const at::Tensor& scale, const at::Tensor& x) {
  check_tensor(op, name, weight, 3, is_int8(weight) ? at::kChar : at::kFloat8_e4m3fn);
  check_tensor(op, scale_name, scale, 3, at::kFloat);
  check_device(op, name, weight, x);
  check_device(op, scale_name, scale, x);
  check(weight.is_contiguous(), op, ": ", name, " has strides ", weight.strides(), ", expected contiguous");
  check(scale.size(0) == weight.size(0) && scale.size(1) >= 1 && scale.size(2) == weight.size(1), op, ": ", scale_name,
        " has shape ", scale.sizes(), ", expected (E, groups, N) with E=", weight.size(0), " and N=", weight.size(1));
}

// A Product without x and its scales, which the caller sets.
cuda::Product product(const at::Tensor& weight, const at::Tensor& scale, const int32_t* offsets, int64_t rows) {
  cuda::Product p{};
  p.x_type = is_int8(weight) ? cuda::Type::bf16 : cuda::Type::e4m3;
  p.weight_type = is_int8(weight) ? cuda::Type::int8 : cuda::Type::e4m3;
  p.weight = weight.const_data_ptr();
  p.weight_scale = scale.const_data_ptr<float>();
  p.offsets = offsets;
  p.rows = rows;
  p.n = weight.size(1);
  p.k = weight.size(2);
  p.experts = weight.size(0);
  p.weight_groups = scale.size(1);
  return p;
}

// Memory for rows of `dim` columns, as a product with these weights reads them: e4m3, or bf16 in `gather_rows` order.
at::Tensor rows_for(const at::Tensor& weight, int64_t rows, int64_t dim) {
  return is_int8(weight) ? scratch(weight, {rows, cuda::gathered_width(dim)}, at::kBFloat16)
                         : scratch(weight, {rows, dim}, at::kFloat8_e4m3fn);
}

// Memory for the scales of such rows; empty for bf16.
at::Tensor scales_for(const at::Tensor& weight, int64_t rows, int64_t dim) {
  return scratch(weight, {is_int8(weight) ? 0 : groups(dim), rows}, at::kFloat);
}

void set_x(cuda::Product& p, const at::Tensor& x, const at::Tensor& scale) {
  p.x = x.const_data_ptr();
  p.x_scale = scale.const_data_ptr<float>();
  p.x_scale_row = 1;
  p.x_scale_group = scale.size(1);
}

// tokens: 0 for the kernels for many rows, else the tile of those with swapped operands.
void launch(const cuda::GroupedGemm& p, int64_t tokens, cuda::Stream stream) {
  tokens ? cuda::swapped_grouped_gemm(p, tokens, stream) : cuda::grouped_gemm(p, stream);
}

void launch(const cuda::GateUp& p, int64_t tokens, cuda::Stream stream) {
  tokens ? cuda::swapped_gate_up(p, tokens, stream) : cuda::gate_up(p, stream);
}

at::Tensor grouped_gemm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                        const std::optional<at::Tensor>& offsets, const std::optional<at::Tensor>& x_scale,
                        at::ScalarType out_dtype, int64_t tokens) {
  const char* op = "grouped_gemm";
  const bool int8 = is_int8(weight);
  check_tensor(op, "x", x, 2, int8 ? at::kBFloat16 : at::kFloat8_e4m3fn);
  check_weight(op, "weight", weight, "weight_scale", weight_scale, x);
  check(x.size(1) == weight.size(2), op, ": x has shape ", x.sizes(), ", expected (M, K) with K=", weight.size(2));
  check(x_scale.has_value() != int8, op, ": x_scale is ", int8 ? "given" : "None", ", expected ",
        int8 ? "None for x of bf16" : "scales for x of e4m3");
  check(out_dtype == at::kFloat || out_dtype == at::kBFloat16, op, ": out_dtype=", c10::toString(out_dtype));
  if (offsets) {
    check_tensor(op, "offsets", *offsets, 1, at::kInt);
    check_device(op, "offsets", *offsets, x);
    check(offsets->size(0) == weight.size(0) + 1 && offsets->is_contiguous(), op, ": offsets has shape ",
          offsets->sizes(), ", expected (E + 1,) with E=", weight.size(0));
  }
  const c10::cuda::CUDAGuard guard(x.device());
  const cuda::Stream stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor scale = readable(weight_scale), y = scratch(x, {x.size(0), weight.size(1)}, out_dtype);
  cuda::GroupedGemm p{};
  p.product = product(weight, scale, offsets ? offsets->const_data_ptr<int32_t>() : nullptr, x.size(0));
  at::Tensor rows;
  if (int8) {
    const at::Tensor plain = readable(x);
    rows = rows_for(weight, x.size(0), x.size(1));
    cuda::gather_rows({static_cast<const uint16_t*>(plain.const_data_ptr()), x.size(1), nullptr, nullptr,
                       static_cast<uint16_t*>(rows.mutable_data_ptr()), x.size(0), x.size(1), 1, 0},
                      stream);
  } else {
    check_tensor(op, "x_scale", *x_scale, 2, at::kFloat);
    check_device(op, "x_scale", *x_scale, x);
    check(x_scale->size(0) == x.size(0) && (x_scale->size(1) == 1 || x_scale->size(1) == groups(x.size(1))), op,
          ": x_scale has shape ", x_scale->sizes(), ", expected (M, 1) or (M, ", groups(x.size(1)),
          ") with M=", x.size(0));
    rows = readable(x);
    p.product.x_scale = x_scale->const_data_ptr<float>();
    p.product.x_scale_row = x_scale->stride(0);
    p.product.x_scale_group = x_scale->size(1) == 1 ? 0 : x_scale->stride(1);
  }
  p.product.x = rows.const_data_ptr();
  p.y = y.mutable_data_ptr();
  p.y_is_float = out_dtype == at::kFloat;
  launch(p, tokens, stream);
  return y;
}

// order or offsets, as `group_tokens` returns them.
void check_grouping(const char* op, const char* name, const at::Tensor& tensor, int64_t size, const at::Tensor& x) {
  check_tensor(op, name, tensor, 1, at::kInt);
  check_device(op, name, tensor, x);
  check(tensor.size(0) == size && tensor.is_contiguous(), op, ": ", name, " has shape ", tensor.sizes(), ", expected (",
        size, ",), contiguous");
}

// Groups the rows itself unless given_order and given_offsets are set. The scratch tensors are freed on return, which
// is safe: torch reuses their memory on this stream only, after the kernels.
at::Tensor moe(const at::Tensor& x, const at::Tensor& topk_weights, const at::Tensor& experts, const at::Tensor& w13,
               const at::Tensor& w13_scale, const at::Tensor& w2, const at::Tensor& w2_scale, int64_t activation,
               const std::optional<at::Tensor>& given_order, const std::optional<at::Tensor>& given_offsets,
               int64_t tokens) {
  const char* op = "moe";
  check_tensor(op, "x", x, 2, at::kBFloat16);
  check_tensor(op, "topk_weights", topk_weights, 2, at::kFloat);
  check_tensor(op, "experts", experts, 2, at::kInt);
  check_device(op, "topk_weights", topk_weights, x);
  check_device(op, "experts", experts, x);
  check_weight(op, "w13", w13, "w13_scale", w13_scale, x);
  check_weight(op, "w2", w2, "w2_scale", w2_scale, x);
  check(w13.scalar_type() == w2.scalar_type(), op, ": w13 and w2 have dtypes ", c10::toString(w13.scalar_type()),
        " and ", c10::toString(w2.scalar_type()), ", expected the same");
  const int64_t t = x.size(0), d = x.size(1), a = experts.size(1), e = w2.size(0), f = w2.size(2), rows = t * a;
  check(experts.size(0) == t && topk_weights.sizes() == experts.sizes(), op, ": experts and topk_weights have shapes ",
        experts.sizes(), " and ", topk_weights.sizes(), ", expected (T, A) with T=", t);
  check(w13.size(0) == e && w13.size(1) == 2 * f && w13.size(2) == d && w2.size(1) == d, op,
        ": w13 and w2 have shapes ", w13.sizes(), " and ", w2.sizes(),
        ", expected (E, 2F, D) and (E, D, F) with D=", d);
  check(activation >= 0 && activation <= 2, op, ": activation=", activation, ", expected 0..2");
  check(given_order.has_value() == given_offsets.has_value(), op, ": ", given_order ? "offsets" : "order",
        " is None, expected both or neither");
  if (given_order) {
    check_grouping(op, "order", *given_order, rows, x);
    check_grouping(op, "offsets", *given_offsets, e + 1, x);
  }
  const c10::cuda::CUDAGuard guard(x.device());
  const cuda::Stream stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor chosen = experts.contiguous(), weights = topk_weights.contiguous(), plain = readable(x),
                   scale13 = readable(w13_scale), scale2 = readable(w2_scale);
  const at::Tensor order = given_order ? *given_order : scratch(x, {rows}, at::kInt),
                   offsets = given_offsets ? *given_offsets : scratch(x, {e + 1}, at::kInt),
                   grouped = rows_for(w13, rows, d), grouped_scale = scales_for(w13, rows, d),
                   inner = rows_for(w2, rows, f), inner_scale = scales_for(w2, rows, f),
                   parts = scratch(x, {rows, d}, at::kFloat), y = scratch(x, {t, d}, at::kBFloat16);
  const auto* x_data = static_cast<const uint16_t*>(plain.const_data_ptr());
  const int32_t* order_data = order.const_data_ptr<int32_t>();
  const int32_t* offsets_data = offsets.const_data_ptr<int32_t>();

  if (!given_order)
    cuda::group_tokens({chosen.const_data_ptr<int32_t>(), order.mutable_data_ptr<int32_t>(),
                        offsets.mutable_data_ptr<int32_t>(), rows, e},
                       stream);
  if (is_int8(w13))
    cuda::gather_rows({x_data, d, order_data, offsets_data, static_cast<uint16_t*>(grouped.mutable_data_ptr()), rows, d,
                       a, e},
                      stream);
  else
    cuda::gather_quantize({x_data, d, order_data, offsets_data, static_cast<uint8_t*>(grouped.mutable_data_ptr()),
                           grouped_scale.mutable_data_ptr<float>(), 1, rows, rows, d, a, e},
                          stream);
  cuda::GateUp up{};
  up.product = product(w13, scale13, offsets_data, rows);
  set_x(up.product, grouped, grouped_scale);
  up.activation = static_cast<cuda::Activation>(activation);
  up.y = inner.mutable_data_ptr();
  up.y_scale = inner_scale.mutable_data_ptr<float>();
  up.y_scale_row = 1;
  up.y_scale_group = rows;
  launch(up, tokens, stream);
  cuda::GroupedGemm down{};
  down.product = product(w2, scale2, offsets_data, rows);
  set_x(down.product, inner, inner_scale);
  down.y = parts.mutable_data_ptr();
  down.y_is_float = true;
  down.order = order_data;
  down.row_weights = weights.const_data_ptr<float>();
  launch(down, tokens, stream);
  cuda::combine({parts.const_data_ptr<float>(), static_cast<uint16_t*>(y.mutable_data_ptr()), t, a, d}, stream);
  return y;
}

}  // namespace
}  // namespace grok

TORCH_LIBRARY_FRAGMENT(grok_cuda, library) {
  library.def(
      "grouped_gemm(Tensor x, Tensor weight, Tensor weight_scale, Tensor? offsets, Tensor? x_scale,"
      " ScalarType out_dtype, int tokens) -> Tensor");
  library.def(
      "moe(Tensor x, Tensor topk_weights, Tensor experts, Tensor w13, Tensor w13_scale, Tensor w2, Tensor w2_scale,"
      " int activation, Tensor? order, Tensor? offsets, int tokens) -> Tensor");
}

TORCH_LIBRARY_IMPL(grok_cuda, CUDA, library) {
  library.impl("grouped_gemm", grok::grouped_gemm);
  library.impl("moe", grok::moe);
}
