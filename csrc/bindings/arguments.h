#pragma once

// Checks of the tensors that the module's functions are called with. They hold whoever calls: Python below the ops'
// own checks, a replay, or a program that keeps a tensor and resizes it later.

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <utility>
#include <vector>

#include "common/check.h"
#include "common/types.h"

namespace grok {

using OptionalTensor = std::optional<at::Tensor>;

// Whether this is an ordinary strided tensor on the CPU. Others are meta or sparse, negative views, or wrap another
// tensor, and may have no memory at all.
bool is_plain(const at::Tensor& tensor);

// A plain tensor whose storage holds all of its elements.
void check_memory(const char* op, const char* name, const at::Tensor& tensor);

// Its address is a multiple of its elements' size, as that of a tensor over a file need not be.
void check_aligned(const char* op, const char* name, const at::Tensor& tensor);

// check_memory and check_aligned; and of `dims` dimensions, the last contiguous.
void check_tensor(const char* op, const char* name, const at::Tensor& tensor, int64_t dims);

void check_dtype(const char* op, const char* name, const at::Tensor& tensor, at::ScalarType expected);

void check_size(const char* op, const char* name, const at::Tensor& tensor, int64_t dim, const char* symbol,
                int64_t expected);

// A tensor that a kernel writes to: no two of its elements share memory. Strides must be nested, each larger than what
// the smaller ones span together, as those of slices, transposed and padded tensors are.
void check_written(const char* op, const char* name, const at::Tensor& tensor);

// The first `written` of these tensors, which check_written has passed, have no byte in common with each other or with
// the rest; null is none. Two of equal shape, strides and dtype may be interleaved; the address ranges of others must
// not intersect.
using Named = std::pair<const char*, const at::Tensor*>;
void check_apart(const char* op, std::initializer_list<Named> tensors, size_t written);

// The type of an activation, of a norm's weight or of a result.
DType float_dtype(const char* op, const char* name, at::ScalarType dtype);
inline DType float_dtype(const char* op, const char* name, const at::Tensor& tensor) {
  return float_dtype(op, name, tensor.scalar_type());
}

// A contiguous copy of int32 indices. What is checked and used must be the copy: another thread may write to the
// tensor between check and use.
std::vector<int32_t> copy_indices(const char* op, const char* name, const at::Tensor& tensor, int64_t dims);

}  // namespace grok
