#include "weight.h"

#include <algorithm>

#include "bindings.h"
#include "cpu/gemm/codes.h"

namespace grok {
namespace {

using PlanePointer = cpu::Plane cpu::Weights::*;

// A plane of scales: which, its name, and whether it is of the first level.
struct PlaneOf {
  PlanePointer plane;
  const char* name;
  bool first;
};
constexpr PlaneOf kScales{&cpu::Weights::scales, "scales", true}, kMinima{&cpu::Weights::minima, "minima", true},
    kZeros{&cpu::Weights::zeros, "zeros", true}, kSubscales{&cpu::Weights::subscales, "subscales", false},
    kSubminima{&cpu::Weights::subminima, "subminima", false}, kNone{};
constexpr size_t kMostPlanes = 4;  // beside the values

struct Format {
  const char* name;
  DType type;
  at::ScalarType dtype;  // of the values in rows
  int bits, zero_point;  // of codes
  PlaneOf planes[kMostPlanes];

  size_t count() const {
    return 1 + std::count_if(planes, planes + kMostPlanes, [](const PlaneOf& plane) { return plane.name; });
  }
};

constexpr Format kFormats[] = {
    {"int8", DType::int8, at::kChar, 0, 0, {kScales}},
    {"fp8_e4m3", DType::e4m3, at::kFloat8_e4m3fn, 0, 0, {kScales}},
    {"bf16", DType::bf16, at::kBFloat16, 0, 0, {}},
    {"fp32", DType::f32, at::kFloat, 0, 0, {}},
    {"int4", DType::int8, at::kChar, 4, 8, {kScales}},
    {"int4_zero", DType::int8, at::kChar, 4, 0, {kScales, kZeros}},
    {"int4_min", DType::int8, at::kChar, 4, 0, {kScales, kMinima}},
    {"int4_k", DType::int8, at::kChar, 4, 0, {kScales, kSubscales, kMinima, kSubminima}},
    {"int5", DType::int8, at::kChar, 5, 16, {kScales}},
    {"int5_min", DType::int8, at::kChar, 5, 0, {kScales, kMinima}},
    {"int5_k", DType::int8, at::kChar, 5, 0, {kScales, kSubscales, kMinima, kSubminima}},
    {"int6_k", DType::int8, at::kChar, 6, 32, {kScales, kSubscales}},
};

const Format& format_of(const char* op, const char* name, const WeightArg& arg) {
  std::string known;
  for (const Format& format : kFormats) {
    if (arg.format == format.name) return format;
    known += std::string(known.empty() ? "" : ", ") + format.name;
  }
  check(false, op, ": ", name, " has format '", arg.format, "', expected one of ", known);
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
  if (w.bits) {
    check(values.is_contiguous() && w.n % cpu::kPanel == 0 && w.k % cpu::kCodeColumns == 0 &&
              values.sizes() ==
                  at::IntArrayRef({w.experts, w.n / cpu::kPanel, w.k / cpu::kCodeColumns, w.bits, cpu::kPanel, 4}),
          op, ": the values of ", name, " have shape ", values.sizes(), ", expected those of pack_codes for (",
          w.experts, ", ", w.n, ", ", w.k, ") of ", w.bits, " bits");
    return;
  }
  const int64_t columns = 4 / size_of(w.type);  // of a run
  check(values.is_contiguous() && w.n % cpu::kPanel == 0 && w.k % 4 == 0 &&
            values.sizes() == at::IntArrayRef({w.experts, w.n / cpu::kPanel, w.k / columns, 4, 16, columns}),
        op, ": the values of ", name, " have shape ", values.sizes(), ", expected those of pack_weight for (",
        w.experts, ", ", w.n, ", ", w.k, ")");
}

bool has_dtype(const PlaneOf& of, bool codes, at::ScalarType dtype, cpu::ScaleType& type) {
  const bool one_byte = !of.first || of.plane == kZeros.plane;
  type = dtype == at::kFloat  ? cpu::ScaleType::f32
         : dtype == at::kHalf ? cpu::ScaleType::f16
         : dtype == at::kByte ? cpu::ScaleType::u8
                              : cpu::ScaleType::i8;
  if (one_byte) return dtype == at::kByte || (!of.first && dtype == at::kChar);
  return dtype == at::kFloat || (dtype == at::kHalf && (codes || of.plane == kScales.plane));
}

// Returns the tensor that owns the plane's memory.
at::Tensor place_plane(const char* op, const char* name, const PlaneOf& of, const at::Tensor& tensor, bool by_panels,
                       cpu::Weights& w) {
  check_memory(op, name, tensor);
  check_aligned(op, name, tensor);
  cpu::Plane& plane = w.*of.plane;
  const bool shape = by_panels
                         ? tensor.dim() == 4 && tensor.size(1) == w.n / cpu::kPanel && tensor.size(3) == cpu::kPanel
                         : tensor.dim() == 3 && tensor.size(2) == w.n;
  const int64_t groups = shape ? tensor.size(by_panels ? 2 : 1) : 0;
  check(shape && has_dtype(of, w.bits, tensor.scalar_type(), plane.type) && tensor.size(0) == w.experts && groups > 0 &&
            w.k % groups == 0,
        op, ": the ", of.name, " of ", name, " have shape ", tensor.sizes(), " and dtype ",
        c10::toString(tensor.scalar_type()), ", expected ", by_panels ? "(E, N / 64, groups, 64)" : "(E, groups, N)",
        of.plane == kZeros.plane ? " of Byte" : of.first ? " of Float or Half" : " of Byte or Char", " with E=",
        w.experts, ", N=", w.n, " and groups a divisor of K=", w.k);
  at::Tensor own = tensor.contiguous();
  const auto lay = by_panels ? cpu::Plane::by_panels : cpu::Plane::by_groups;
  plane = lay(own.const_data_ptr(), plane.type, groups, w.n);
  return own;
}

// Scales and minima have as many groups, and so have those of the second level; each of these lies within one of those.
void check_groups(const char* op, const char* name, const cpu::Weights& w) {
  const int64_t first = w.scales.groups, second = w.subscales.data ? w.subscales.groups : first;
  const auto same = [](const cpu::Plane& plane, int64_t groups) { return !plane.data || plane.groups == groups; };
  check(same(w.minima, first) && same(w.zeros, first) && same(w.subminima, second) && second % first == 0, op, ": ",
        name, " has ", first, " groups of scales, ", w.subscales.groups, " of subscales, ",
        w.zeros.data ? w.zeros.groups : w.minima.groups, w.zeros.data ? " of zeros and " : " of minima and ",
        w.subminima.groups, " of subminima, expected equal numbers at each level, the second a multiple of the first");
  check(!w.bits || w.layout == cpu::Layout::rows || w.group() % cpu::kLeastCodeGroup == 0, op, ": ", name,
        " has groups of ", w.group(), " columns, expected a multiple of ", cpu::kLeastCodeGroup, " in panels");
}

}  // namespace

KernelWeight kernel_weight(const char* op, const char* name, const WeightArg& arg) {
  const Format& format = format_of(op, name, arg);
  check(arg.planes.size() == format.count(), op, ": ", name, " has ", arg.planes.size(), " planes, expected ",
        format.count(), " of format ", format.name);
  const bool packed_codes = format.bits && arg.layout == "panels";
  check_dtype(op, name, arg.planes[0], packed_codes ? at::kByte : format.dtype);
  KernelWeight result{};
  cpu::Weights& w = result.w;
  w.type = format.type;
  w.bits = format.bits;
  w.zero_point = format.zero_point;
  w.experts = arg.experts;
  w.n = arg.n;
  w.k = arg.k;
  w.groups = 1;
  place_values(op, name, arg, w);
  for (size_t i = 1; i < arg.planes.size(); ++i) {
    const PlaneOf& of = format.planes[i - 1];
    result.own.push_back(place_plane(op, name, of, arg.planes[i], packed_codes, w));
    if (of.plane == kScales.plane || of.plane == kSubscales.plane) w.groups = (w.*of.plane).groups;
  }
  if (arg.planes.size() > 1) check_groups(op, name, w);
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
