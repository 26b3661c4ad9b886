#include "bindings.h"
#include "cpu/gemm/grouped_gemm.h"
#include "native_op.h"
#include "weight.h"

namespace grok {
namespace {

at::Tensor grouped_gemm(const at::Tensor& x, const WeightArg& weight, const OptionalTensor& offsets,
                        const OptionalTensor& x_scale, std::optional<at::ScalarType> out_dtype) {
  const char* op = "grouped_gemm";
  check_tensor(op, "x", x, 2);
  const KernelWeight own = kernel_weight(op, "weight", weight);
  cpu::GroupedGemm p{};
  p.w = own.w;
  p.rows = x.size(0);
  p.x.data = x.const_data_ptr();
  p.x.type = element_type(op, "x", x);
  p.x.stride = x.stride(0);
  check(x.size(1) == p.w.k, op, ": x has shape ", x.sizes(), ", expected (M, K) with K=", p.w.k, " from weight");
  const bool is_float = p.x.type == DType::f32 || p.x.type == DType::bf16;
  check(is_float != x_scale.has_value(), op, ": x_scale is ", x_scale ? "given" : "None", " for x of ",
        c10::toString(x.scalar_type()));
  const at::ScalarType y_dtype = out_dtype.value_or(is_float ? x.scalar_type() : at::kBFloat16);
  p.y_type = float_dtype(op, "out_dtype", y_dtype);
  at::Tensor own_scale;
  if (x_scale) {
    check_tensor(op, "x_scale", *x_scale, 2);
    check_dtype(op, "x_scale", *x_scale, at::kFloat);
    const int64_t groups = x_scale->size(1), expected = (p.w.k + cpu::kScaleGroup - 1) / cpu::kScaleGroup;
    check(x_scale->size(0) == p.rows && (groups == 1 || groups == expected), op, ": x_scale has shape ",
          x_scale->sizes(), ", expected (M, 1) or (M, ceil(K / 128)) with M=", p.rows, " and K=", p.w.k);
    own_scale = x_scale->contiguous();
    p.x.scale = own_scale.const_data_ptr<float>();
    p.x.groups = groups;
  }
  std::vector<int32_t> own_offsets;
  if (offsets) {
    own_offsets = copy_indices(op, "offsets", *offsets, 1);
    check(offsets->size(0) == p.w.experts + 1, op, ": offsets has ", offsets->size(0),
          " entries, expected (E + 1,) with E=", p.w.experts);
    p.offsets = own_offsets.data();
  }
  at::Tensor y = empty({p.rows, p.w.n}, y_dtype);
  p.y = y.mutable_data_ptr();
  cpu::grouped_gemm(p, executor());
  return y;
}

}  // namespace

void define_gemm(pybind11::module_& module) {
  using pybind11::arg;
  define_native_op(module, "grouped_gemm", grouped_gemm, arg("x"), arg("weight"), arg("offsets"), arg("x_scale"),
                   arg("out_dtype"));
}

}  // namespace grok
