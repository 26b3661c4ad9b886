#include "bindings.h"
#include "cpu/rms_norm.h"

namespace grok {
namespace {

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  check_tensor("rms_norm", "x", x, 2);
  check_tensor("rms_norm", "weight", weight, 1);
  check(weight.size(0) == x.size(1), "rms_norm: weight has shape ", weight.sizes(), ", expected (D,) with D=",
        x.size(1), " from x");
  const auto rows = cpu::rms_norm_rows(cpu::current_isa(), float_dtype("rms_norm", "x", x),
                                       float_dtype("rms_norm", "weight", weight));
  at::Tensor y = at::empty(x.sizes(), x.options());
  cpu::RmsNorm p{};
  p.x = x.const_data_ptr();
  p.weight = weight.const_data_ptr();
  p.y = y.mutable_data_ptr();
  p.x_stride = x.stride(0);
  p.d = x.size(1);
  p.eps = static_cast<float>(eps);
  const int64_t rows_per_task = std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, p.d));
  at::parallel_for(0, x.size(0), rows_per_task, [&](int64_t begin, int64_t end) { rows(p, begin, end); });
  return y;
}

}  // namespace
}  // namespace grok

TORCH_LIBRARY_FRAGMENT(grok_cpu, library) { library.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor"); }

TORCH_LIBRARY_IMPL(grok_cpu, CPU, library) { library.impl("rms_norm", grok::rms_norm); }
