#include "cpu/sample.h"

#include <limits>

#include "bindings.h"
#include "native_op.h"

namespace grok {
namespace {

const float* row_values(const char* name, const at::Tensor& values, int64_t rows) {
  const char* op = "sample_top_p";
  check_tensor(op, name, values, 1);
  check(values.size(0) == rows, op, ": ", name, " has shape ", values.sizes(), ", expected (B,) with B=", rows,
        " from logits");
  check(values.scalar_type() == at::kFloat, op, ": ", name, " has dtype ", c10::toString(values.scalar_type()),
        ", expected Float");
  return values.const_data_ptr<float>();
}

at::Tensor sample_top_p(const at::Tensor& logits, const at::Tensor& temperature, const at::Tensor& top_p,
                        const at::Tensor& uniform) {
  constexpr int64_t kMost = std::numeric_limits<int32_t>::max();
  check_tensor("sample_top_p", "logits", logits, 2);
  const int64_t b = logits.size(0);
  cpu::SampleTopP p{};
  p.v = logits.size(1);
  check(p.v >= 1 && p.v <= kMost, "sample_top_p: V of logits=", p.v, ", expected 1..", kMost);
  p.rows = b;
  p.logits_type = float_dtype("sample_top_p", "logits", logits);
  p.temperature = row_values("temperature", temperature, b);
  p.top_p = row_values("top_p", top_p, b);
  p.uniform = row_values("uniform", uniform, b);
  at::Tensor tokens = empty({b}, at::kLong);
  p.logits = logits.const_data_ptr();
  p.tokens = tokens.mutable_data_ptr<int64_t>();
  p.logits_stride = logits.stride(0);
  cpu::sample_top_p(p, executor());
  return tokens;
}

}  // namespace

void define_sample(pybind11::module_& module) {
  using pybind11::arg;
  define_native_op(module, "sample_top_p", sample_top_p, arg("logits"), arg("temperature"), arg("top_p"),
                   arg("uniform"));
}

}  // namespace grok
