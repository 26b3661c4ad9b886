// The only file that knows torch and pybind11: checks tensors, hands pointers to the kernels, registers them in the
// namespace grok_cpu. The contract of each op is in grok_kernels/ops.py; here is checked what memory safety needs.

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <torch/csrc/utils/pybind.h>
#include <torch/library.h>
#include <torch/version.h>

#include <algorithm>
#include <string>
#include <vector>

#include "common/check.h"
#include "common/types.h"
#include "cpu/isa.h"
#include "cpu/rms_norm.h"

namespace grok {
namespace {

DType dtype(const char* op, const char* name, const at::Tensor& tensor) {
  if (tensor.scalar_type() == at::kFloat) return DType::f32;
  check(tensor.scalar_type() == at::kBFloat16, op, ": ", name, " has dtype ", c10::toString(tensor.scalar_type()),
        ", expected Float or BFloat16");
  return DType::bf16;
}

void check_tensor(const char* op, const char* name, const at::Tensor& tensor, int64_t dims) {
  check(tensor.device().is_cpu(), op, ": ", name, " is on ", tensor.device(), ", expected cpu");
  check(tensor.dim() == dims, op, ": ", name, " has shape ", tensor.sizes(), ", expected ", dims, " dimensions");
  check(tensor.size(-1) <= 1 || tensor.stride(-1) == 1 || tensor.numel() == 0, op, ": ", name, " has strides ", tensor.strides(),
        ", expected its last dimension contiguous");
}

// Enough elements for a thread that waking it pays.
constexpr int64_t kElementsPerTask = 32768;

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  check_tensor("rms_norm", "x", x, 2);
  check_tensor("rms_norm", "weight", weight, 1);
  check(weight.size(0) == x.size(1), "rms_norm: weight has shape ", weight.sizes(), ", expected (D,) with D=",
        x.size(1), " from x");
  const auto rows = cpu::rms_norm_rows(cpu::current_isa(), dtype("rms_norm", "x", x), dtype("rms_norm", "weight", weight));
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

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (cpu::Isa isa : cpu::available_isas()) names.push_back(cpu::name(isa));
  return names;
}

// The distinct threads that share a parallel loop of `tasks` steps: tells a serial build from a parallel one.
int64_t parallel_threads(int64_t tasks) {
  std::vector<int> ids(tasks, 0);
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) ids[i] = at::get_thread_num();
  });
  std::sort(ids.begin(), ids.end());
  return std::unique(ids.begin(), ids.end()) - ids.begin();
}

}  // namespace
}  // namespace grok

TORCH_LIBRARY(grok_cpu, library) { library.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor"); }

TORCH_LIBRARY_IMPL(grok_cpu, CPU, library) { library.impl("rms_norm", grok::rms_norm); }

PYBIND11_MODULE(_C, module) {
  module.attr("torch_version") = TORCH_VERSION;  // of the headers it was compiled against
  module.def("available_isas", &grok::available_isas, "The instruction sets this machine can run, best first.");
  module.def("current_isa", [] { return grok::cpu::name(grok::cpu::current_isa()); }, "The instruction set in use.");
  module.def("use_isa", &grok::cpu::use_isa, pybind11::arg("name"), "Force one for the process; '' undoes it.");
  module.def("parallel_threads", &grok::parallel_threads, pybind11::arg("tasks"),
             "How many threads share a parallel loop of so many steps.");
}
