// The Python module grok_kernels._C: the native kernels as plain functions, and what they run on.

#include <torch/version.h>

#include <string>
#include <vector>

#include "bindings.h"
#include "cpu/isa.h"

namespace grok {
namespace {

std::vector<std::string> available_isas() {
  std::vector<std::string> names;
  for (cpu::Isa isa : cpu::available_isas()) names.push_back(cpu::name(isa));
  return names;
}

// The distinct threads that share a loop of `tasks` steps: tells a build without OpenMP from one with it.
int64_t parallel_threads(int64_t tasks) {
  constexpr int64_t kMost = 1 << 20;
  check(tasks >= 0 && tasks <= kMost, "parallel_threads: tasks=", tasks, ", expected 0..", kMost);
  std::vector<int> ids(tasks, 0);
  executor().run(tasks, [&](int64_t i) { ids[i] = at::get_thread_num(); });
  std::sort(ids.begin(), ids.end());
  return std::unique(ids.begin(), ids.end()) - ids.begin();
}

}  // namespace
}  // namespace grok

PYBIND11_MODULE(_C, module) {
  module.attr("torch_version") = TORCH_VERSION;  // of the headers it was compiled against
  module.def("available_isas", &grok::available_isas, "The instruction sets this machine can run, best first.");
  module.def("current_isa", [] { return grok::cpu::name(grok::cpu::current_isa()); }, "The instruction set in use.");
  module.def("use_isa", &grok::cpu::use_isa, pybind11::arg("name"), "Force one for the process; '' undoes it.");
  module.def("parallel_threads", &grok::parallel_threads, pybind11::arg("tasks"),
             pybind11::call_guard<pybind11::gil_scoped_release>(),
             "How many threads share a parallel loop of so many steps.");
  grok::define_attention(module);
  grok::define_executor(module);
  grok::define_gemm(module);
  grok::define_moe(module);
  grok::define_norm(module);
  grok::define_pack(module);
  grok::define_probe(module);
  grok::define_quantize(module);
  grok::define_recording(module);
  grok::define_route(module);
  grok::define_sample(module);
  grok::define_signature(module);
}
