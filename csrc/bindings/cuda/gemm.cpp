// The Hopper kernels' products in torch, under grok_cuda::. The contract of each op, and the rest of its checks, is in
// grok_kernels/ops.py; which calls come here is said by grok_kernels/cuda.py.

#include "cuda/include/grok/gemm.h"

#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include "tensors.h"

namespace grok {
namespace {

constexpr int64_t kGroup = 128;

int64_t groups(int64_t columns) { return (columns + kGroup - 1) / kGroup; }

// Weights are not copied to be readable: that would take as long as the product.
void check_weight(const char* op, const char* name, const at::Tensor& weight, const char* scale_name,
                  const at::Tensor& scale, const at::Tensor& x) {
  check_tensor(op, name, weight, 3, at::kFloat8_e4m3fn);
  check_tensor(op, scale_name, scale, 3, at::kFloat);
  check_device(op, name, weight, x);
  check_device(op, scale_name, scale, x);
  check(weight.is_contiguous(), op, ": ", name, " has strides ", weight.strides(), ", expected contiguous");
  check(scale.size(0) == weight.size(0) && scale.size(1) == 1 && scale.size(2) == weight.size(1), op, ": ", scale_name,
        " has shape ", scale.sizes(), ", expected (E, 1, N) with E=", weight.size(0), " and N=", weight.size(1));
}

// x and its scales are set by the caller.
cuda::Product product(const at::Tensor& weight, const at::Tensor& scale, const int32_t* offsets, int64_t rows) {
  cuda::Product p{};
  p.x_type = p.weight_type = cuda::Type::e4m3;
  p.weight = weight.const_data_ptr();
  p.weight_scale = scale.const_data_ptr<float>();
  p.offsets = offsets;
  p.rows = rows;
  p.n = weight.size(1);
  p.k = weight.size(2);
  p.experts = weight.size(0);
  p.weight_groups = 1;
  return p;
}

at::Tensor grouped_gemm_fp8(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& weight_scale,
                            const std::optional<at::Tensor>& offsets, const at::Tensor& x_scale,
                            at::ScalarType out_dtype) {
  const char* op = "grouped_gemm";
  check_tensor(op, "x", x, 2, at::kFloat8_e4m3fn);
  check_tensor(op, "x_scale", x_scale, 2, at::kFloat);
  check_device(op, "x_scale", x_scale, x);
  check_weight(op, "weight", weight, "weight_scale", weight_scale, x);
  check(x.size(1) == weight.size(2), op, ": x has shape ", x.sizes(), ", expected (M, K) with K=", weight.size(2));
  check(x_scale.size(0) == x.size(0) && (x_scale.size(1) == 1 || x_scale.size(1) == groups(x.size(1))), op,
        ": x_scale has shape ", x_scale.sizes(), ", expected (M, 1) or (M, ", groups(x.size(1)),
        ") with M=", x.size(0));
  check(out_dtype == at::kFloat || out_dtype == at::kBFloat16, op, ": out_dtype=", c10::toString(out_dtype));
  if (offsets) {
    check_tensor(op, "offsets", *offsets, 1, at::kInt);
    check_device(op, "offsets", *offsets, x);
    check(offsets->size(0) == weight.size(0) + 1 && offsets->is_contiguous(), op, ": offsets has shape ",
          offsets->sizes(), ", expected (E + 1,) with E=", weight.size(0));
  }
  const c10::cuda::CUDAGuard guard(x.device());
  const at::Tensor rows = readable(x), scale = readable(weight_scale),
                   y = scratch(x, {x.size(0), weight.size(1)}, out_dtype);
  cuda::GroupedGemm p{};
  p.product = product(weight, scale, offsets ? offsets->const_data_ptr<int32_t>() : nullptr, x.size(0));
  p.product.x = rows.const_data_ptr();
  p.product.x_scale = x_scale.const_data_ptr<float>();
  p.product.x_scale_row = x_scale.stride(0);
  p.product.x_scale_group = x_scale.size(1) == 1 ? 0 : x_scale.stride(1);
  p.y = y.mutable_data_ptr();
  p.y_is_float = out_dtype == at::kFloat;
  cuda::grouped_gemm(p, c10::cuda::getCurrentCUDAStream());
  return y;
}

// What is allocated here, torch frees at the end and reuses on the stream only after the kernels.
at::Tensor moe_fp8(const at::Tensor& x, const at::Tensor& topk_weights, const at::Tensor& experts,
                   const at::Tensor& w13, const at::Tensor& w13_scale, const at::Tensor& w2, const at::Tensor& w2_scale,
                   int64_t activation) {
  const char* op = "moe";
  check_tensor(op, "x", x, 2, at::kBFloat16);
  check_tensor(op, "topk_weights", topk_weights, 2, at::kFloat);
  check_tensor(op, "experts", experts, 2, at::kInt);
  check_device(op, "topk_weights", topk_weights, x);
  check_device(op, "experts", experts, x);
  check_weight(op, "w13", w13, "w13_scale", w13_scale, x);
  check_weight(op, "w2", w2, "w2_scale", w2_scale, x);
  const int64_t t = x.size(0), d = x.size(1), a = experts.size(1), e = w2.size(0), f = w2.size(2), rows = t * a;
  check(experts.size(0) == t && topk_weights.sizes() == experts.sizes(), op, ": experts and topk_weights have shapes ",
        experts.sizes(), " and ", topk_weights.sizes(), ", expected (T, A) with T=", t);
  check(w13.size(0) == e && w13.size(1) == 2 * f && w13.size(2) == d && w2.size(1) == d, op,
        ": w13 and w2 have shapes ", w13.sizes(), " and ", w2.sizes(),
        ", expected (E, 2F, D) and (E, D, F) with D=", d);
  check(activation >= 0 && activation <= 2, op, ": activation=", activation, ", expected 0..2");
  const c10::cuda::CUDAGuard guard(x.device());
  const cuda::Stream stream = c10::cuda::getCurrentCUDAStream();
  const at::Tensor chosen = experts.contiguous(), weights = topk_weights.contiguous(), tokens = readable(x),
                   scale13 = readable(w13_scale), scale2 = readable(w2_scale);
  const at::Tensor order = scratch(x, {rows}, at::kInt), offsets = scratch(x, {e + 1}, at::kInt),
                   q = scratch(x, {rows, d}, at::kFloat8_e4m3fn), q_scale = scratch(x, {groups(d), rows}, at::kFloat),
                   inner = scratch(x, {rows, f}, at::kFloat8_e4m3fn),
                   inner_scale = scratch(x, {groups(f), rows}, at::kFloat), parts = scratch(x, {rows, d}, at::kFloat),
                   y = scratch(x, {t, d}, at::kBFloat16);
  const int32_t* order_data = order.const_data_ptr<int32_t>();
  const int32_t* offsets_data = offsets.const_data_ptr<int32_t>();

  cuda::group_tokens({chosen.const_data_ptr<int32_t>(), order.mutable_data_ptr<int32_t>(),
                      offsets.mutable_data_ptr<int32_t>(), rows, e},
                     stream);
  cuda::gather_quantize(
      {static_cast<const uint16_t*>(tokens.const_data_ptr()), d, order_data, offsets_data,
       static_cast<uint8_t*>(q.mutable_data_ptr()), q_scale.mutable_data_ptr<float>(), 1, rows, rows, d, a, e},
      stream);
  cuda::GateUp up{};
  up.product = product(w13, scale13, offsets_data, rows);
  up.product.x = q.const_data_ptr();
  up.product.x_scale = q_scale.const_data_ptr<float>();
  up.product.x_scale_row = 1;
  up.product.x_scale_group = rows;
  up.activation = static_cast<cuda::Activation>(activation);
  up.y = static_cast<uint8_t*>(inner.mutable_data_ptr());
  up.y_scale = inner_scale.mutable_data_ptr<float>();
  up.y_scale_row = 1;
  up.y_scale_group = rows;
  cuda::gate_up(up, stream);
  cuda::GroupedGemm down{};
  down.product = product(w2, scale2, offsets_data, rows);
  down.product.x = inner.const_data_ptr();
  down.product.x_scale = inner_scale.const_data_ptr<float>();
  down.product.x_scale_row = 1;
  down.product.x_scale_group = rows;
  down.y = parts.mutable_data_ptr();
  down.y_is_float = true;
  down.order = order_data;
  down.row_weights = weights.const_data_ptr<float>();
  cuda::grouped_gemm(down, stream);
  cuda::combine({parts.const_data_ptr<float>(), static_cast<uint16_t*>(y.mutable_data_ptr()), t, a, d}, stream);
  return y;
}

}  // namespace
}  // namespace grok

TORCH_LIBRARY_FRAGMENT(grok_cuda, library) {
  library.def(
      "grouped_gemm_fp8(Tensor x, Tensor weight, Tensor weight_scale, Tensor? offsets, Tensor x_scale,"
      " ScalarType out_dtype) -> Tensor");
  library.def(
      "moe_fp8(Tensor x, Tensor topk_weights, Tensor experts, Tensor w13, Tensor w13_scale, Tensor w2, Tensor w2_scale,"
      " int activation) -> Tensor");
}

TORCH_LIBRARY_IMPL(grok_cuda, CUDA, library) {
  library.impl("grouped_gemm_fp8", grok::grouped_gemm_fp8);
  library.impl("moe_fp8", grok::moe_fp8);
}
