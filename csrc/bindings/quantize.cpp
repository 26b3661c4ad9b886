#include "cpu/quantize.h"

#include "bindings.h"
#include "native_op.h"

namespace grok {
namespace {

std::tuple<at::Tensor, at::Tensor> quantize(const char* op, const at::Tensor& x, int64_t group_size, DType format) {
  check_tensor(op, "x", x, 2);
  check(group_size >= 0, op, ": group_size=", group_size, ", expected 0 or more");
  cpu::QuantizeRows p{};
  p.x_type = float_dtype(op, "x", x);
  p.q_type = format;
  p.rows = x.size(0);
  p.d = x.size(1);
  const int64_t columns = std::max<int64_t>(1, p.d);
  p.group = group_size ? std::min(group_size, columns) : columns;
  p.groups = group_size ? (p.d + p.group - 1) / p.group : 1;
  at::Tensor q = empty(x.sizes(), format == DType::e4m3 ? at::kFloat8_e4m3fn : at::kChar);
  at::Tensor scale = empty({x.size(0), p.groups}, at::kFloat);
  p.x = x.const_data_ptr();
  p.q = q.mutable_data_ptr();
  p.scale = scale.mutable_data_ptr<float>();
  p.x_stride = x.stride(0);
  cpu::quantize_rows(p, executor());
  return {q, scale};
}

std::tuple<at::Tensor, at::Tensor> quantize_fp8(const at::Tensor& x, int64_t group_size) {
  return quantize("quantize_fp8", x, group_size, DType::e4m3);
}

std::tuple<at::Tensor, at::Tensor> quantize_int8(const at::Tensor& x, int64_t group_size) {
  return quantize("quantize_int8", x, group_size, DType::int8);
}

}  // namespace

void define_quantize(pybind11::module_& module) {
  using pybind11::arg;
  define_native_op(module, "quantize_fp8", quantize_fp8, arg("x"), arg("group_size"));
  define_native_op(module, "quantize_int8", quantize_int8, arg("x"), arg("group_size"));
}

}  // namespace grok
