// The machine's ceilings, measured on the threads that the kernels run on. These functions are not ops.

#include "cpu/probe.h"

#include <string>

#include "bindings.h"

namespace grok {
namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "";  // its version begins with its name
#else
constexpr const char* kCompiler = "GCC ";
#endif

uint64_t probe_read(const at::Tensor& tensor) {
  check_memory("probe_read", "tensor", tensor);
  check(tensor.is_contiguous(), "probe_read: tensor has strides ", tensor.strides(), ", expected a contiguous one");
  return cpu::probe_read(tensor.const_data_ptr(), tensor.nbytes(), executor());
}

int64_t probe_peak(const std::string& kind, int64_t iterations) {
  constexpr int64_t kMost = int64_t{1} << 40;  // the operations are counted in int64
  check(iterations <= kMost, "probe_peak: iterations=", iterations, ", expected at most ", kMost);
  return cpu::run_probe_peak(cpu::probe_peak(kind), iterations, executor());
}

}  // namespace

void define_probe(pybind11::module_& module) {
  using pybind11::arg;
  using Free = pybind11::call_guard<pybind11::gil_scoped_release>;
  module.attr("compiler") = std::string(kCompiler) + __VERSION__;
  module.def("probe_read", &probe_read, arg("tensor"), Free(),
             "Read every byte; the sum of its words of 8 bytes, modulo 2^64.");
  module.def("probe_peak", &probe_peak, arg("kind"), arg("iterations"), Free(),
             "Run multiply-adds (fp32, bf16 or int8) in registers, on every thread; the operations done.");
  module.def("probe_instruction", [](const std::string& kind) { return cpu::probe_peak(kind).instruction; },
             arg("kind"), "The instruction that probe_peak runs.");
}

}  // namespace grok
