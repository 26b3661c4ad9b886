#include "cpu/norm.h"

#include "bindings.h"
#include "native_op.h"

namespace grok {
namespace {

DType check_weight(const char* op, const char* name, const at::Tensor& weight, const char* of, int64_t d) {
  check_tensor(op, name, weight, 1);
  check(weight.size(0) == d, op, ": ", name, " has shape ", weight.sizes(), ", expected (D,) with D=", d, " from ", of);
  return float_dtype(op, name, weight);
}

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  check_tensor("rms_norm", "x", x, 2);
  cpu::RmsNorm p{};
  p.d = x.size(1);
  p.rows = x.size(0);
  p.weight_type = check_weight("rms_norm", "weight", weight, "x", p.d);
  p.x_type = float_dtype("rms_norm", "x", x);
  at::Tensor y = empty(x.sizes(), x.scalar_type());
  p.x = x.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.y = y.mutable_data_ptr();
  p.x_stride = x.stride(0);
  p.eps = static_cast<float>(eps);
  cpu::rms_norm(p, executor());
  return y;
}

std::tuple<at::Tensor, at::Tensor> sandwich_norm(const at::Tensor& h, const at::Tensor& delta,
                                                 const OptionalTensor& post_weight,
                                                 const at::Tensor& pre_weight, double eps) {
  const char* op = "sandwich_norm";
  check_tensor(op, "h", h, 2);
  check_tensor(op, "delta", delta, 2);
  check(delta.sizes() == h.sizes(), op, ": delta has shape ", delta.sizes(), ", expected ", h.sizes(), " as h");
  check(delta.scalar_type() == h.scalar_type(), op, ": delta has dtype ", c10::toString(delta.scalar_type()),
        ", expected ", c10::toString(h.scalar_type()), " as h");
  cpu::SandwichNorm p{};
  p.d = h.size(1);
  if (post_weight) p.post_type = check_weight(op, "post_weight", *post_weight, "h", p.d);
  p.pre_type = check_weight(op, "pre_weight", pre_weight, "h", p.d);
  p.type = float_dtype(op, "h", h);
  p.rows = h.size(0);
  at::Tensor sum = empty(h.sizes(), h.scalar_type()), y = empty(h.sizes(), h.scalar_type());
  p.h = h.const_data_ptr();
  p.delta = delta.const_data_ptr();
  p.post_weight = post_weight ? post_weight->const_data_ptr() : nullptr;
  p.pre_weight = pre_weight.const_data_ptr();
  p.sum = sum.mutable_data_ptr();
  p.y = y.mutable_data_ptr();
  p.h_stride = h.stride(0);
  p.delta_stride = delta.stride(0);
  p.eps = static_cast<float>(eps);
  cpu::sandwich_norm(p, executor());
  return {sum, y};
}

at::Tensor scaled_sum(const at::Tensor& a, const at::Tensor& b, double divisor) {
  const char* op = "scaled_sum";
  check_tensor(op, "a", a, 2);
  check_tensor(op, "b", b, 2);
  check(b.sizes() == a.sizes() && b.scalar_type() == a.scalar_type(), op, ": b has shape ", b.sizes(), " and dtype ",
        c10::toString(b.scalar_type()), ", expected ", a.sizes(), " and ", c10::toString(a.scalar_type()), " as a");
  cpu::ScaledSum p{};
  p.type = float_dtype(op, "a", a);
  at::Tensor y = empty(a.sizes(), a.scalar_type());
  p.a = a.const_data_ptr();
  p.b = b.const_data_ptr();
  p.y = y.mutable_data_ptr();
  p.a_stride = a.stride(0);
  p.b_stride = b.stride(0);
  p.rows = a.size(0);
  p.d = a.size(1);
  p.divisor = static_cast<float>(divisor);
  cpu::scaled_sum(p, executor());
  return y;
}

}  // namespace

void define_norm(pybind11::module_& module) {
  using pybind11::arg;
  define_native_op(module, "rms_norm", rms_norm, arg("x"), arg("weight"), arg("eps"));
  define_native_op(module, "sandwich_norm", sandwich_norm, arg("h"), arg("delta"), arg("post_weight"),
                   arg("pre_weight"), arg("eps"));
  define_native_op(module, "scaled_sum", scaled_sum, arg("a"), arg("b"), arg("divisor"));
}

}  // namespace grok
