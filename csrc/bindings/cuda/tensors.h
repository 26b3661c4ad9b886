#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>

#include "common/check.h"

// Checks and scratch tensors that the bindings of the Hopper kernels share.

namespace grok {

inline void check_tensor(const char* op, const char* name, const at::Tensor& tensor, int64_t dims,
                         at::ScalarType type) {
  check(tensor.is_cuda(), op, ": ", name, " is on ", tensor.device(), ", expected cuda");
  check(tensor.dim() == dims, op, ": ", name, " has shape ", tensor.sizes(), ", expected ", dims, " dimensions");
  check(tensor.scalar_type() == type, op, ": ", name, " has dtype ", c10::toString(tensor.scalar_type()), ", expected ",
        c10::toString(type));
}

inline void check_device(const char* op, const char* name, const at::Tensor& tensor, const at::Tensor& x) {
  check(tensor.device() == x.device(), op, ": ", name, " is on ", tensor.device(), ", expected ", x.device(), " as x");
}

// The tensor, or a copy, such that vector loads can read it: contiguous and aligned to 16 bytes.
inline at::Tensor readable(const at::Tensor& tensor) {
  const bool aligned = reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0;
  return aligned ? tensor.contiguous() : tensor.clone(at::MemoryFormat::Contiguous);
}

inline at::Tensor scratch(const at::Tensor& like, at::IntArrayRef shape, at::ScalarType type) {
  return at::empty(shape, like.options().dtype(type));
}

}  // namespace grok
