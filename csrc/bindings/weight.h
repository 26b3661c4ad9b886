#pragma once

#include <ATen/core/Tensor.h>
#include <torch/csrc/utils/pybind.h>

#include <cstdint>
#include <string>
#include <vector>

#include "cpu/gemm/layout.h"
#include "common/types.h"

namespace grok {

// A quantised or plain weight, the `Weight` of grok_kernels, as the module's functions take it: any Python object
// with these attributes.
struct WeightArg {
  std::string format;              // of kFormats in weight.cpp
  std::string layout;              // "rows" or "panels"
  int64_t experts, n, k;           // shape
  std::vector<at::Tensor> planes;  // the values, then those of the format's scales and minima
};

// The parameters of the kernels. `own` has the planes that had to be made contiguous: keep it until the call ends.
struct KernelWeight {
  cpu::Weights w;
  std::vector<at::Tensor> own;
};

// ValueError where the format or the layout is unknown to the kernels, or a plane does not fit them or the shape.
KernelWeight kernel_weight(const char* op, const char* name, const WeightArg& arg);

// The type of x or of a result.
DType element_type(const char* op, const char* name, const at::Tensor& tensor);

}  // namespace grok

template <>
struct pybind11::detail::type_caster<grok::WeightArg> {
  PYBIND11_TYPE_CASTER(grok::WeightArg, const_name("Weight"));
  bool load(handle source, bool convert);
};
