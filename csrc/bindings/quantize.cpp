#include "cpu/quantize.h"

#include <tuple>

#include "bindings.h"
#include "direct.h"

namespace grok {
namespace {

std::tuple<at::Tensor, at::Tensor> quantize(const char* op, const at::Tensor& x, int64_t group_size,
                                            DType format) {
  check_tensor(op, "x", x, 2);
  check(group_size >= 0, op, ": group_size=", group_size, ", expected 0 or more");
  const auto rows = cpu::quantize_rows(cpu::current_isa(), format, float_dtype(op, "x", x));
  cpu::Quantize p{};
  p.d = x.size(1);
  p.group = group_size ? group_size : std::max<int64_t>(1, p.d);
  p.groups = group_size ? (p.d + group_size - 1) / group_size : 1;
  at::Tensor q = empty(x.sizes(), format == DType::e4m3 ? at::kFloat8_e4m3fn : at::kChar);
  at::Tensor scale = empty({x.size(0), p.groups}, at::kFloat);
  p.x = x.const_data_ptr();
  p.q = q.mutable_data_ptr();
  p.scale = scale.mutable_data_ptr<float>();
  p.x_stride = x.stride(0);
  at::parallel_for(0, x.size(0), rows_per_task(p.d), [&](int64_t begin, int64_t end) { rows(p, begin, end); });
  return {q, scale};
}

std::tuple<at::Tensor, at::Tensor> quantize_fp8(const at::Tensor& x, int64_t group_size) {
  return quantize("quantize_fp8", x, group_size, DType::e4m3);
}

std::tuple<at::Tensor, at::Tensor> quantize_int8(const at::Tensor& x, int64_t group_size) {
  return quantize("quantize_int8", x, group_size, DType::int8);
}

const Direct kDirect[] = {{"quantize_fp8", quantize_fp8}, {"quantize_int8", quantize_int8}};

}  // namespace
}  // namespace grok

TORCH_LIBRARY_FRAGMENT(grok_cpu, library) {
  library.def("quantize_fp8(Tensor x, int group_size) -> (Tensor, Tensor)");
  library.def("quantize_int8(Tensor x, int group_size) -> (Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(grok_cpu, CPU, library) {
  library.impl("quantize_fp8", grok::quantize_fp8);
  library.impl("quantize_int8", grok::quantize_int8);
}
