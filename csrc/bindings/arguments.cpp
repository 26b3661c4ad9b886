#include "arguments.h"

#include <c10/core/DispatchKeySet.h>
#include <c10/util/SmallVector.h>

#include <algorithm>
#include <cstring>

namespace grok {
namespace {

// The dispatch keys of an ordinary tensor on the CPU.
const c10::DispatchKeySet kPlain = c10::DispatchKeySet(c10::DispatchKey::CPU) | c10::autocast_dispatch_keyset |
                                   c10::autograd_dispatch_keyset_with_ADInplaceOrView;

// A dimension with more than one entry, in bytes.
struct Dim {
  int64_t size, stride;
};
using Dims = c10::SmallVector<Dim, 8>;

// The bytes of an element, then the dimensions in the order of their strides.
Dims dims_of(const at::Tensor& tensor) {
  const int64_t item = tensor.element_size();
  Dims dims{{item, 1}};
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) != 1) dims.push_back({tensor.size(i), tensor.stride(i) * item});
  }
  std::sort(dims.begin() + 1, dims.end(), [](const Dim& a, const Dim& b) { return a.stride < b.stride; });
  return dims;
}

// Elements from a tensor's first to its last.
int64_t reach(const at::Tensor& tensor) {
  const auto sizes = tensor.sizes(), strides = tensor.strides();
  int64_t last = 0;
  for (size_t i = 0; i < sizes.size(); ++i) last += (sizes[i] - 1) * strides[i];
  return last;
}

// Whether two tensors with these dimensions, nested as check_written has it, whose first bytes are `distance` apart
// share a byte: whether distance is a sum of d · stride over the dimensions, with |d| < size in each. The inner
// dimensions span less than a stride, so that d is one of two numbers.
bool meets(const Dims& dims, size_t count, int64_t distance) {
  if (count == 0) return distance == 0;
  const Dim& dim = dims[count - 1];
  const int64_t below = distance / dim.stride - (distance % dim.stride < 0);
  for (int64_t d = below; d <= below + 1; ++d) {
    if (d > -dim.size && d < dim.size && meets(dims, count - 1, distance - d * dim.stride)) return true;
  }
  return false;
}

}  // namespace

bool is_plain(const at::Tensor& tensor) { return tensor.defined() && kPlain.has_all(tensor.key_set()); }

void check_memory(const char* op, const char* name, const at::Tensor& tensor) {
  if (!is_plain(tensor)) {
    check(tensor.device().is_cpu(), op, ": ", name, " is on ", tensor.device(), ", expected cpu");
    check(false, op, ": ", name, " has the dispatch keys ", c10::toString(tensor.key_set()),
          ", expected those of a plain tensor");
  }
  if (tensor.numel() == 0) return;
  const int64_t last = tensor.is_contiguous() ? tensor.numel() - 1 : reach(tensor);
  const int64_t bytes = (tensor.storage_offset() + last + 1) * static_cast<int64_t>(tensor.element_size());
  check(bytes <= static_cast<int64_t>(tensor.storage().nbytes()), op, ": ", name, " has shape ", tensor.sizes(),
        " and strides ", tensor.strides(), ", which reach to byte ", bytes, " of a storage of ",
        tensor.storage().nbytes());
}

void check_aligned(const char* op, const char* name, const at::Tensor& tensor) {
  check(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % tensor.element_size() == 0, op, ": ", name,
        " begins at address ", tensor.const_data_ptr(), ", expected a multiple of ", tensor.element_size());
}

void check_tensor(const char* op, const char* name, const at::Tensor& tensor, int64_t dims) {
  check_memory(op, name, tensor);
  check(tensor.dim() == dims, op, ": ", name, " has shape ", tensor.sizes(), ", expected ", dims, " dimensions");
  check(tensor.size(-1) <= 1 || tensor.stride(-1) == 1 || tensor.numel() == 0, op, ": ", name, " has strides ",
        tensor.strides(), ", expected its last dimension contiguous");
  check_aligned(op, name, tensor);
}

void check_dtype(const char* op, const char* name, const at::Tensor& tensor, at::ScalarType expected) {
  check(tensor.scalar_type() == expected, op, ": ", name, " has dtype ", c10::toString(tensor.scalar_type()),
        ", expected ", c10::toString(expected));
}

void check_size(const char* op, const char* name, const at::Tensor& tensor, int64_t dim, const char* symbol,
                int64_t expected) {
  check(tensor.size(dim) == expected, op, ": ", name, " has shape ", tensor.sizes(), ", expected ", symbol, "=",
        expected, " in dimension ", dim);
}

void check_written(const char* op, const char* name, const at::Tensor& tensor) {
  if (tensor.numel() == 0 || tensor.is_contiguous()) return;
  int64_t span = 0;
  for (const Dim& dim : dims_of(tensor)) {
    check(dim.stride > span, op, ": ", name, " has shape ", tensor.sizes(), " and strides ", tensor.strides(),
          ", expected elements that share no memory, since they are written");
    span += (dim.size - 1) * dim.stride;
  }
}

void check_apart(const char* op, std::initializer_list<Named> tensors, size_t written) {
  struct Range {
    int64_t begin, end;
  };
  c10::SmallVector<Range, 8> ranges;
  for (const auto& [name, tensor] : tensors) {
    if (!tensor || tensor->numel() == 0) {
      ranges.push_back({0, 0});
      continue;
    }
    const auto begin = reinterpret_cast<int64_t>(tensor->const_data_ptr());
    ranges.push_back({begin, begin + (reach(*tensor) + 1) * static_cast<int64_t>(tensor->element_size())});
  }
  for (size_t i = 0; i < written; ++i) {
    for (size_t j = i + 1; j < ranges.size(); ++j) {
      if (ranges[i].end <= ranges[j].begin || ranges[j].end <= ranges[i].begin) continue;
      const auto& [name, tensor] = tensors.begin()[i];
      const auto& [other_name, other] = tensors.begin()[j];
      const bool alike = tensor->sizes() == other->sizes() && tensor->strides() == other->strides() &&
                         tensor->element_size() == other->element_size();
      const Dims dims = dims_of(*tensor);
      check(alike && !meets(dims, dims.size(), ranges[j].begin - ranges[i].begin), op, ": ", name, " and ", other_name,
            " lie in the same memory, and ", name, " is written");
    }
  }
}

DType float_dtype(const char* op, const char* name, at::ScalarType dtype) {
  if (dtype == at::kFloat) return DType::f32;
  check(dtype == at::kBFloat16, op, ": ", name, " has dtype ", c10::toString(dtype), ", expected Float or BFloat16");
  return DType::bf16;
}

std::vector<int32_t> copy_indices(const char* op, const char* name, const at::Tensor& tensor, int64_t dims) {
  check_tensor(op, name, tensor, dims);
  check_dtype(op, name, tensor, at::kInt);
  std::vector<int32_t> copy(tensor.numel());
  if (copy.empty()) return copy;
  const int64_t rows = dims == 2 ? tensor.size(0) : 1, columns = tensor.size(-1), stride = tensor.stride(0);
  const auto* data = tensor.const_data_ptr<int32_t>();
  for (int64_t row = 0; row < rows; ++row) {
    std::memcpy(copy.data() + row * columns, data + row * stride, columns * sizeof(int32_t));
  }
  return copy;
}

}  // namespace grok
