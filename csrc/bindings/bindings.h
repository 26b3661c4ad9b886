#pragma once

// Shared by the files of this folder, which alone know torch and pybind11. They check what memory safety needs, fill
// the parameters of the kernels in csrc/cpu, and define the functions of the Python module. The contract of each op,
// and the rest of its checks, is in kernels/grok_kernels.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "common/check.h"
#include "common/types.h"
#include "cpu/executor.h"

namespace grok {

using OptionalTensor = std::optional<at::Tensor>;

// torch's threads, which every kernel of the module runs on.
cpu::Executor& executor();

// A new tensor on the CPU, made without the dispatcher; in a replay (recording.h), the one of the recording.
at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype);

inline void check_tensor(const char* op, const char* name, const at::Tensor& tensor, int64_t dims) {
  check(tensor.device().is_cpu(), op, ": ", name, " is on ", tensor.device(), ", expected cpu");
  check(tensor.dim() == dims, op, ": ", name, " has shape ", tensor.sizes(), ", expected ", dims, " dimensions");
  check(tensor.size(-1) <= 1 || tensor.stride(-1) == 1 || tensor.numel() == 0, op, ": ", name, " has strides ",
        tensor.strides(), ", expected its last dimension contiguous");
}

inline void check_dtype(const char* op, const char* name, const at::Tensor& tensor, at::ScalarType expected) {
  check(tensor.scalar_type() == expected, op, ": ", name, " has dtype ", c10::toString(tensor.scalar_type()),
        ", expected ", c10::toString(expected));
}

// The type of an activation or of a norm's weight.
inline DType float_dtype(const char* op, const char* name, const at::Tensor& tensor) {
  if (tensor.scalar_type() == at::kFloat) return DType::f32;
  check(tensor.scalar_type() == at::kBFloat16, op, ": ", name, " has dtype ", c10::toString(tensor.scalar_type()),
        ", expected Float or BFloat16");
  return DType::bf16;
}

// Each adds the functions of a file to the module.
void define_attention(pybind11::module_& module);
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
