#pragma once

// Shared by the files of this folder, which alone know torch and pybind11. They check what memory safety needs, fill
// the parameters of the kernels in csrc/cpu, and define the functions of the Python module. The contract of each op,
// and the rest of its checks, is in kernels/grok_kernels.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <tuple>

#include "arguments.h"
#include "common/check.h"
#include "common/types.h"
#include "cpu/executor.h"

namespace grok {

// torch's threads, which every kernel of the module runs on.
cpu::Executor& executor();

// A new tensor on the CPU, made without the dispatcher; in a replay (recording.h), the one of the recording.
at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype);

// Each adds the functions of a file to the module.
void define_attention(pybind11::module_& module);
void define_executor(pybind11::module_& module);
void define_gemm(pybind11::module_& module);
void define_moe(pybind11::module_& module);
void define_norm(pybind11::module_& module);
void define_pack(pybind11::module_& module);
void define_probe(pybind11::module_& module);
void define_quantize(pybind11::module_& module);
void define_recording(pybind11::module_& module);
void define_route(pybind11::module_& module);
void define_sample(pybind11::module_& module);
void define_signature(pybind11::module_& module);

}  // namespace grok
