#pragma once

#include <torch/csrc/utils/pybind.h>

namespace grok {

// Adds probe_read, probe_peak, probe_instruction and compiler to the Python module.
void define_probes(pybind11::module_& module);

}  // namespace grok
