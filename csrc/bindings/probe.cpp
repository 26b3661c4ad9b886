// The machine's ceilings, measured on the threads that the kernels run on. Plain functions of the module, not ops.

#include "cpu/probe.h"

#include <atomic>
#include <string>

#include "bindings.h"
#include "probe.h"

namespace grok {
namespace {

#if defined(__clang__)
constexpr const char* kCompiler = "";  // its version begins with its name
#else
constexpr const char* kCompiler = "GCC ";
#endif

cpu::ProbePeak peak(const std::string& kind) {
  check(kind == "fp32" || kind == "bf16" || kind == "int8", "probe: kind='", kind, "', expected fp32, bf16 or int8");
  const auto arithmetic = kind == "fp32"   ? cpu::Arithmetic::fp32
                          : kind == "bf16" ? cpu::Arithmetic::bf16
                                           : cpu::Arithmetic::int8;
  return cpu::probe_peak(cpu::current_isa(), arithmetic);
}

// Each thread reads one contiguous part.
uint64_t probe_read(const at::Tensor& tensor) {
  check(tensor.device().is_cpu(), "probe_read: tensor is on ", tensor.device(), ", expected cpu");
  check(tensor.is_contiguous(), "probe_read: tensor has strides ", tensor.strides(), ", expected a contiguous one");
  const auto read = cpu::probe_read(cpu::current_isa());
  const char* data = static_cast<const char*>(tensor.const_data_ptr());
  const int64_t bytes = static_cast<int64_t>(tensor.nbytes());
  constexpr int64_t kBlock = 4096;
  std::atomic<uint64_t> sum{0};
  at::parallel_for(0, (bytes + kBlock - 1) / kBlock, 1, [&](int64_t begin, int64_t end) {
    sum += read(data + begin * kBlock, static_cast<size_t>(std::min(end * kBlock, bytes) - begin * kBlock));
  });
  return sum;
}

// Every thread takes so many steps. Returns the operations done, by all of them.
int64_t probe_peak(const std::string& kind, int64_t iterations) {
  check(iterations > 0, "probe_peak: iterations=", iterations, ", expected at least 1");
  const cpu::ProbePeak probe = peak(kind);
  const int64_t threads = at::get_num_threads();
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) { probe.run((end - begin) * iterations); });
  return threads * iterations * probe.operations_per_step;
}

}  // namespace

void define_probes(pybind11::module_& module) {
  using pybind11::arg;
  using Free = pybind11::call_guard<pybind11::gil_scoped_release>;
  module.attr("compiler") = std::string(kCompiler) + __VERSION__;
  module.def("probe_read", &probe_read, arg("tensor"), Free(),
             "Reads every byte; the sum of its words of 8 bytes, modulo 2^64.");
  module.def("probe_peak", &probe_peak, arg("kind"), arg("iterations"), Free(),
             "Runs multiply-adds (fp32, bf16 or int8) in registers, on every thread; the operations done.");
  module.def("probe_instruction", [](const std::string& kind) { return peak(kind).instruction; }, arg("kind"),
             "The instruction that probe_peak runs.");
}

}  // namespace grok
