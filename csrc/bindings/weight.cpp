#include "weight.h"

#include <optional>

#include "bindings.h"

namespace grok {
namespace {

struct Format {
  const char* name;
  DType type;
  at::ScalarType dtype;
  size_t planes;
};

constexpr Format kFormats[] = {
    {"int8", DType::int8, at::kChar, 2},
    {"fp8_e4m3", DType::e4m3, at::kFloat8_e4m3fn, 2},
    {"bf16", DType::bf16, at::kBFloat16, 1},
    {"fp32", DType::f32, at::kFloat, 1},
};

const Format& format_of(const char* op, const char* name, const WeightArg& arg) {
  for (const Format& format : kFormats) {
    if (arg.format == format.name) return format;
  }
  check(false, op, ": ", name, " has format '", arg.format, "', expected int8, fp8_e4m3, bf16 or fp32");
  return kFormats[0];
}

void place_values(const char* op, const char* name, const WeightArg& arg, cpu::Weights& w) {
  const at::Tensor& values = arg.planes[0];
  if (arg.layout == "rows") {
    w.layout = cpu::Layout::rows;
    check_tensor(op, name, values, 3);
    w.data = values.const_data_ptr();
    check(values.sizes() == at::IntArrayRef({w.experts, w.n, w.k}), op, ": the values of ", name, " have shape ",
          values.sizes(), ", expected (", w.experts, ", ", w.n, ", ", w.k, ")");
    w.expert_stride = values.stride(0);
    w.row_stride = values.stride(1);
    return;
  }
  check(arg.layout == "panels", op, ": ", name, " has layout '", arg.layout, "', expected rows or panels");
  check_memory(op, name, values);
  check_aligned(op, name, values);
  w.layout = cpu::Layout::panels;
  w.data = values.const_data_ptr();
  const int64_t columns = 4 / size_of(w.type);  // of a run
  check(values.is_contiguous() && w.n % cpu::kPanel == 0 && w.k % 4 == 0 &&
            values.sizes() == at::IntArrayRef({w.experts, w.n / cpu::kPanel, w.k / columns, 4, 16, columns}),
        op, ": the values of ", name, " have shape ", values.sizes(), ", expected those of pack_weight for (",
        w.experts, ", ", w.n, ", ", w.k, ")");
}

}  // namespace

KernelWeight kernel_weight(const char* op, const char* name, const WeightArg& arg) {
  const Format& format = format_of(op, name, arg);
  check(arg.planes.size() == format.planes, op, ": ", name, " has ", arg.planes.size(), " planes, expected ",
        format.planes, " of format ", format.name);
  check_dtype(op, name, arg.planes[0], format.dtype);
  KernelWeight result{};
  cpu::Weights& w = result.w;
  w.type = format.type;
  w.experts = arg.experts;
  w.n = arg.n;
  w.k = arg.k;
  place_values(op, name, arg, w);
  if (format.planes == 1) return result;
  const at::Tensor& scale = arg.planes[1];
  check_memory(op, name, scale);
  check_aligned(op, name, scale);
  check(scale.scalar_type() == at::kFloat && scale.dim() == 3 && scale.size(0) == w.experts && scale.size(2) == w.n &&
            scale.size(1) > 0 && w.k % scale.size(1) == 0,
        op, ": the scale of ", name, " has shape ", scale.sizes(), " and dtype ", c10::toString(scale.scalar_type()),
        ", expected (E, groups, N) of Float with E=", w.experts, ", N=", w.n, " and groups a divisor of K=", w.k);
  result.scale = scale.contiguous();
  w.scale = result.scale.const_data_ptr<float>();
  w.groups = scale.size(1);
  return result;
}

DType element_type(const char* op, const char* name, const at::Tensor& tensor) {
  for (const Format& format : kFormats) {
    if (tensor.scalar_type() == format.dtype) return format.type;
  }
  check(false, op, ": ", name, " has dtype ", c10::toString(tensor.scalar_type()),
        ", expected Float, BFloat16, Char or Float8_e4m3fn");
  return DType::f32;
}

}  // namespace grok

// A tensor's type is checked exactly as an argument of type Tensor is. An attribute that is missing or of another
// type makes the call a TypeError.
bool pybind11::detail::type_caster<grok::WeightArg>::load(handle source, bool convert) {
  static PyObject* const names[] = {PyUnicode_InternFromString("format"), PyUnicode_InternFromString("layout"),
                                    PyUnicode_InternFromString("shape"), PyUnicode_InternFromString("planes")};
  object attributes[4];
  for (int i = 0; i < 4; ++i) {
    attributes[i] = reinterpret_steal<object>(PyObject_GetAttr(source.ptr(), names[i]));
    if (!attributes[i]) {
      PyErr_Clear();
      return false;
    }
  }
  const auto text = [](const object& from, std::string& to) {
    Py_ssize_t size = 0;
    const char* data = PyUnicode_Check(from.ptr()) ? PyUnicode_AsUTF8AndSize(from.ptr(), &size) : nullptr;
    if (!data) {
      PyErr_Clear();
      return false;
    }
    to.assign(data, static_cast<size_t>(size));
    return true;
  };
  if (!text(attributes[0], value.format) || !text(attributes[1], value.layout)) return false;
  if (!isinstance<tuple>(attributes[2]) || !isinstance<tuple>(attributes[3])) return false;
  const auto shape = reinterpret_borrow<tuple>(attributes[2]), planes = reinterpret_borrow<tuple>(attributes[3]);
  if (shape.size() != 3) return false;
  int64_t* const sizes[] = {&value.experts, &value.n, &value.k};
  for (int i = 0; i < 3; ++i) {
    make_caster<int64_t> size;
    if (!size.load(shape[i], convert)) return false;
    *sizes[i] = static_cast<int64_t>(size);
  }
  value.planes.reserve(planes.size());
  for (const handle plane : planes) {
    make_caster<at::Tensor> tensor;
    if (!tensor.load(plane, convert)) return false;
    value.planes.push_back(cast_op<at::Tensor&>(tensor));
  }
  return true;
}
