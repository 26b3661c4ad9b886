// The Python module grok_kernels._C: its import registers the ops, and it says on what they run.

#include <torch/csrc/utils/pybind.h>
#include <torch/version.h>

#include <string>
#include <vector>

#include "bindings.h"
#include "direct.h"
#include "probe.h"
#include "recording.h"
#include "signature.h"

namespace grok {
namespace {

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

PYBIND11_MODULE(_C, module) {
  module.attr("torch_version") = TORCH_VERSION;  // of the headers it was compiled against
  module.def("available_isas", &grok::available_isas, "The instruction sets this machine can run, best first.");
  module.def("current_isa", [] { return grok::cpu::name(grok::cpu::current_isa()); }, "The instruction set in use.");
  module.def("use_isa", &grok::cpu::use_isa, pybind11::arg("name"), "Force one for the process; '' undoes it.");
  module.def("parallel_threads", &grok::parallel_threads, pybind11::arg("tasks"),
             "How many threads share a parallel loop of so many steps.");
  module.def("signature", &grok::signature, pybind11::arg("args"),
             "What the checks of a plain call on the CPU depend on, as bytes; None for any other call.");
  grok::define_probes(module);
  grok::define_recording(module);
  grok::Direct::define_all(module);
}
