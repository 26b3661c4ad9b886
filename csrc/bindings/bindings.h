#pragma once

// Shared by the files of this folder, the only ones that know torch and pybind11. They check what memory safety needs,
// hand pointers to the kernels, and register them in the namespace grok_cpu. The contract of each op, and the rest of
// its checks, is in grok_kernels/ops.py; the schemas here are those of there.

#include <ATen/Parallel.h>
#include <torch/library.h>

#include <algorithm>

#include "common/check.h"
#include "common/types.h"
#include "cpu/isa.h"

namespace grok {

// Enough elements for a thread that waking it pays.
constexpr int64_t kElementsPerTask = 32768;

// Rows of d elements that are enough.
inline int64_t rows_per_task(int64_t d) { return std::max<int64_t>(1, kElementsPerTask / std::max<int64_t>(1, d)); }

inline void check_tensor(const char* op, const char* name, const at::Tensor& tensor, int64_t dims) {
  check(tensor.device().is_cpu(), op, ": ", name, " is on ", tensor.device(), ", expected cpu");
  check(tensor.dim() == dims, op, ": ", name, " has shape ", tensor.sizes(), ", expected ", dims, " dimensions");
  check(tensor.size(-1) <= 1 || tensor.stride(-1) == 1 || tensor.numel() == 0, op, ": ", name, " has strides ",
        tensor.strides(), ", expected its last dimension contiguous");
}

// A new tensor on the CPU, without a way through the dispatcher; in a replay (recording.h) the one of the recording.
at::Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype);

// Of an activation or a norm's weight.
inline DType float_dtype(const char* op, const char* name, const at::Tensor& tensor) {
  if (tensor.scalar_type() == at::kFloat) return DType::f32;
  check(tensor.scalar_type() == at::kBFloat16, op, ": ", name, " has dtype ", c10::toString(tensor.scalar_type()),
        ", expected Float or BFloat16");
  return DType::bf16;
}

}  // namespace grok
