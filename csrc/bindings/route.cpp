#include "cpu/route.h"

#include <limits>
#include <vector>

#include "bindings.h"
#include "native_op.h"

namespace grok {
namespace {

constexpr int64_t kMost = std::numeric_limits<int32_t>::max();

std::tuple<at::Tensor, at::Tensor> route_topk(const at::Tensor& x, const at::Tensor& router, int64_t k, double softcap,
                                              bool renormalize) {
  const char* op = "route_topk";
  check_tensor(op, "x", x, 2);
  check_tensor(op, "router", router, 2);
  check(router.size(1) == x.size(1), op, ": router has shape ", router.sizes(), ", expected (E, D) with D=", x.size(1),
        " from x");
  check_dtype(op, "router", router, at::kFloat);
  check(router.size(0) <= kMost, op, ": router has shape ", router.sizes(), ", expected ", kMost, " experts at most");
  check(k >= 1 && k <= router.size(0), op, ": k=", k, ", expected 1..E=", router.size(0));
  cpu::RouteTopk p{};
  p.x_type = float_dtype(op, "x", x);
  at::Tensor weights = empty({x.size(0), k}, at::kFloat);
  at::Tensor experts = empty({x.size(0), k}, at::kInt);
  p.x = x.const_data_ptr();
  p.router = router.const_data_ptr<float>();
  p.weights = weights.mutable_data_ptr<float>();
  p.experts = experts.mutable_data_ptr<int32_t>();
  p.x_stride = x.stride(0);
  p.router_stride = router.stride(0);
  p.rows = x.size(0);
  p.d = x.size(1);
  p.e = router.size(0);
  p.k = k;
  p.softcap = static_cast<float>(softcap);
  p.renormalize = renormalize;
  cpu::route_topk(p, executor());
  return {weights, experts};
}

std::tuple<at::Tensor, at::Tensor> group_tokens(const at::Tensor& experts, int64_t num_experts) {
  const char* op = "group_tokens";
  const std::vector<int32_t> own_experts = copy_indices(op, "experts", experts, 2);
  check(experts.numel() <= kMost, op, ": experts has shape ", experts.sizes(), ", expected ", kMost,
        " entries at most");
  check(num_experts >= 1 && num_experts <= kMost, op, ": num_experts=", num_experts, ", expected 1..", kMost);
  at::Tensor order = empty({experts.numel()}, at::kInt);
  at::Tensor offsets = empty({num_experts + 1}, at::kInt);
  cpu::GroupTokens p{};
  p.experts = own_experts.data();
  p.order = order.mutable_data_ptr<int32_t>();
  p.offsets = offsets.mutable_data_ptr<int32_t>();
  p.stride = experts.size(1);
  p.rows = experts.size(0);
  p.a = experts.size(1);
  p.num_experts = num_experts;
  cpu::group_tokens(p);
  return {order, offsets};
}

}  // namespace

void define_route(pybind11::module_& module) {
  using pybind11::arg;
  define_native_op(module, "route_topk", route_topk, arg("x"), arg("router"), arg("k"), arg("softcap"),
                   arg("renormalize"));
  define_native_op(module, "group_tokens", group_tokens, arg("experts"), arg("num_experts"));
}

}  // namespace grok
